"""Processes of their own, forked from one that has imported torch and the library: an import takes seconds."""

import multiprocessing

import torch

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def context():
    """Return what makes processes."""
    made = torch.multiprocessing.get_context(METHOD)
    made.set_forkserver_preload(["pytest", "tests.cases"])
    return made


def exit_code(function, *arguments):
    """Return what a process that calls ``function(*arguments)`` ends with: minus the signal that killed it."""
    process = context().Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def run_ranks(function, world_size, folder):
    """Return what ``function(rank, world_size, rendezvous, results)`` wrote into ``results`` on every rank."""
    with context().Manager() as manager:
        results = manager.dict()
        arguments = (world_size, f"file://{folder / 'rendezvous'}", results)
        torch.multiprocessing.start_processes(function, arguments, nprocs=world_size, start_method=METHOD)
        return dict(results)
