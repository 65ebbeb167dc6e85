"""Naive float64 references, one sample and one class at a time, written from the formulas."""

import math

import numpy as np


def unit(vector):
    return vector / np.linalg.norm(vector)


def cross_entropy(logits, target):
    top = max(logits)
    return top + math.log(sum(math.exp(z - top) for z in logits)) - logits[target]


def linear_losses(embeddings, weight, bias, targets):
    return [
        cross_entropy([float(e @ w) + float(b) for w, b in zip(weight, bias, strict=True)], t)
        for e, t in zip(embeddings, targets, strict=True)
    ]


def cosine_losses(embeddings, weight, scale, targets):
    return [
        cross_entropy([scale * float(unit(e) @ unit(w)) for w in weight], t)
        for e, t in zip(embeddings, targets, strict=True)
    ]


def fit_width(embedding, width):
    return np.concatenate([embedding, np.zeros(max(0, width - len(embedding)))])[:width]


def bct_loss(task_loss, embeddings, labels, old_labels, old_loss_of, old_width, weight):
    """Task loss plus ``weight`` times the mean old loss over the samples whose label the old classifier knows."""
    old_rows = {label: row for row, label in enumerate(old_labels)}
    terms = [
        old_loss_of(fit_width(e, old_width), old_rows[y])
        for e, y in zip(embeddings, labels, strict=True)
        if y in old_rows
    ]
    return task_loss + (weight * sum(terms) / len(terms) if terms else 0.0)


def angle(a, b):
    return math.acos(min(1.0, max(-1.0, float(unit(a) @ unit(b)))))


def class_centers(embeddings, labels, normalize=True, boundary="max"):
    """Return {label: (centre, boundary, count)}."""
    result = {}
    for label in sorted(set(labels.tolist())):
        own = [e for e, y in zip(embeddings, labels.tolist(), strict=True) if y == label]
        center = unit(sum(unit(e) if normalize else e for e in own) / len(own))
        angles = sorted(angle(e, center) for e in own)
        n = len(angles)
        if boundary == "iqr" and n >= 4:
            q1, q3 = angles[n // 4], angles[3 * n // 4]
            angles = [a for a in angles if a <= q3 + 1.5 * (q3 - q1)]
        result[label] = (center, max(angles), n)
    return result


def fit_centers(embeddings, targets, centers, scale, epochs, lr):
    """Return the directions after an Adam step an epoch on all rows, the rate falling as half a cosine."""
    rows, n = [unit(e) for e in embeddings], len(embeddings)
    weight, mean, square = centers.copy(), np.zeros_like(centers), np.zeros_like(centers)
    for step in range(epochs):
        gradient = np.zeros_like(weight)
        for f, y in zip(rows, targets, strict=True):
            lengths = [np.linalg.norm(w) for w in weight]
            cosines = [float(f @ w) / length for w, length in zip(weight, lengths, strict=True)]
            powers = [math.exp(scale * c) for c in cosines]
            for j, (w, length) in enumerate(zip(weight, lengths, strict=True)):
                slope = scale * (powers[j] / sum(powers) - (j == y)) / n
                gradient[j] += slope * (f - cosines[j] * w / length) / length
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        rate = lr * 0.5 * (1 + math.cos(math.pi * step / epochs))
        step_size = np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8
        weight = weight - rate * mean / (1 - 0.9 ** (step + 1)) / step_size
    return np.array([unit(w) for w in weight])


def ridge_regression(source, target, ridge, bias):
    """Return the weight and the offset that minimise |x W + b - y|^2 / N + ridge |W|^2."""
    n = len(source)
    x_mean, y_mean = (source.mean(0), target.mean(0)) if bias else (0.0, 0.0)
    x, y = source - x_mean, target - y_mean
    # the same problem as ordinary least squares with sqrt(ridge N) I below the data
    x = np.concatenate([x, math.sqrt(ridge * n) * np.eye(x.shape[1])])
    y = np.concatenate([y, np.zeros((source.shape[1], y.shape[1]))])
    weight = np.linalg.lstsq(x, y, rcond=None)[0]
    return weight, y_mean - x_mean @ weight if bias else 0.0


def generalised_cross_validation(source, target, ridge, bias):
    """Return the mean squared error of ridge regression over the squared share of rows that its hat matrix leaves."""
    n = len(source)
    x, y = (source - source.mean(0), target - target.mean(0)) if bias else (source, target)
    hat = x @ np.linalg.inv(x.T @ x + ridge * n * np.eye(x.shape[1])) @ x.T
    left = 1 - (np.trace(hat) + bool(bias)) / n
    return ((y - hat @ y) ** 2).sum() / n / left**2


def procrustes(source, target):
    left, _, right = np.linalg.svd(source.T @ target, full_matrices=False)
    return left @ right


def residual_bottleneck(embeddings, state, blocks, paths, training):
    def norm(x, key):
        mean, var = (x.mean(0), x.var(0)) if training else (state[f"{key}.running_mean"], state[f"{key}.running_var"])
        return (x - mean) / np.sqrt(var + 2e-5) * state[f"{key}.weight"] + state[f"{key}.bias"]

    x = embeddings
    for b in range(blocks):
        skip = state.get(f"blocks.{b}.skip.weight")
        out = x if skip is None else x @ skip.T
        for p in range(paths):
            h = x
            for layer in (0, 3, 6):
                key = f"blocks.{b}.paths.{p}."
                h = norm(h @ state[f"{key}{layer}.weight"].T, f"{key}{layer + 1}")
                h = np.where(h > 0, h, h * state[f"{key}{layer + 2}.weight"])
            out = out + h
        x = out
    return x


def lce_alignment(directions, centers, forward=None, backward=None):
    """``directions`` and ``centers`` are lists of unit rows of the classes in common; the maps take one row."""

    def mean_squared(one, other):
        return np.mean([(a - b) ** 2 for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)])

    errors = []
    if forward is None and backward is None:
        errors.append(mean_squared(directions, centers))
    if forward is not None:
        errors.append(mean_squared(directions, [forward(c) for c in centers]))
    if backward is not None:
        errors.append(mean_squared([backward(w) for w in directions], centers))
    return sum(errors) / len(errors)


def lce_boundary(embeddings, labels, centers, boundaries, kind):
    """``centers`` and ``boundaries`` are dictionaries by label; samples of other labels do not count."""
    terms = []
    for embedding, label in zip(embeddings, labels, strict=True):
        if label not in boundaries:
            continue
        cosine = float(unit(embedding) @ unit(centers[label]))
        if kind == "angle":
            terms.append(max(0.0, math.acos(min(1 - 1e-6, max(-1 + 1e-6, cosine))) - boundaries[label]))
        else:
            terms.append(max(0.0, math.cos(boundaries[label]) - cosine))
    return sum(terms) / len(terms) if terms else 0.0


def fct_transformation(old, side, state, training):
    """``side`` is ``old`` once more where there is no side-information."""

    def layer(rows, key, number):
        weight, norm = state[f"{key}.{number}.weight"], f"{key}.{number + 1}"
        out = np.array([[sum(a * b for a, b in zip(row, unit, strict=True)) for unit in weight] for row in rows])
        for i, column in enumerate(out.T):
            mean, variance = state[f"{norm}.running_mean"][i], state[f"{norm}.running_var"][i]
            if training:
                mean, variance = sum(column) / len(column), sum((column - column.mean()) ** 2) / len(column)
            normed = (column - mean) / math.sqrt(variance + 1e-5)
            out[:, i] = [max(0.0, x * state[f"{norm}.weight"][i] + state[f"{norm}.bias"][i]) for x in normed]
        return out

    old, side = layer(old, "old_branch", 0), layer(side, "side_branch", 0)
    old, side = layer(old, "old_branch", 3), layer(side, "side_branch", 3)
    mixed = np.array([[*a, *b] for a, b in zip(old, side, strict=True)])
    mixed = layer(layer(mixed, "mix", 0), "mix", 3)
    return np.array([state["mix.6.weight"] @ row + state["mix.6.bias"] for row in mixed])


def fct_losses(mapped, target, kind):
    losses = []
    for h, f in zip(mapped, target, strict=True):
        if kind == "cosine":
            losses.append(1.0 - float(unit(h) @ unit(f)))
            continue
        if kind == "unit":
            h, f = unit(h), unit(f)
        losses.append(sum((a - b) ** 2 for a, b in zip(h, f, strict=True)) / len(h))
    return losses


def fct_contrast(mapped, target, labels, temperature):
    """Return what each new embedding misses of the transformed ones of its class."""
    losses = []
    for f, y in zip(target, labels, strict=True):
        logits = [float(unit(f) @ unit(h)) / temperature for h in mapped]
        positives = [cross_entropy(logits, j) for j in range(len(mapped)) if labels[j] == y]
        losses.append(sum(positives) / len(positives))
    return losses


def ract_losses(new_emb, old_emb, labels, *, temperature, margin, top_k, regression, form):
    new, old = [unit(e) for e in new_emb], [unit(e) for e in old_emb]
    losses = []
    for i, anchor in enumerate(new):
        sides = []
        for rows in [old, new] if regression else [old]:
            negatives = [rows[j] for j in range(len(new)) if labels[j] != labels[i]]
            sides.append(sorted(negatives, key=lambda row: np.linalg.norm(anchor - row))[:top_k])
        if form == "contrastive":
            positive = float(anchor @ old[i])
            logits = [positive] + [float(anchor @ row) for side in sides for row in side]
            losses.append(cross_entropy([z / temperature for z in logits], 0))
            continue
        within = margin + np.linalg.norm(anchor - old[i])
        hinges = [[max(0.0, within - np.linalg.norm(anchor - row)) for row in side] for side in sides]
        losses.append(sum(sum(side) / len(side) for side in hinges if side))
    return losses


def point_alignment_losses(new_emb, old_emb, weight, threshold, squared, normalize):
    losses = []
    for a, o in zip(new_emb, old_emb, strict=True):
        if normalize:
            a, o = unit(a), unit(o)
        beyond = max(0.0, math.sqrt(sum((x - y) ** 2 for x, y in zip(a, o, strict=True))) - threshold)
        losses.append(weight * (beyond**2 if squared else beyond))
    return losses


def raml_terms(new_emb, old_emb, cross_weight, self_weight):
    new, old = ([unit(row) for row in rows] for rows in (new_emb, old_emb))
    dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
    n = len(new)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    mean = lambda values: sum(values) / max(1, len(values))  # noqa: E731
    return {
        "point_loss": mean([(1 - dot(new[i], old[i])) ** 2 for i in range(n)]),
        "cross_loss": cross_weight * mean([(dot(new[i], old[j]) - dot(old[i], old[j])) ** 2 for i, j in pairs]),
        "self_loss": self_weight * mean([(dot(new[i], new[j]) - dot(old[i], old[j])) ** 2 for i, j in pairs]),
    }


def neighbours(old, gallery, count):
    """Of each unit row the ``count`` unit rows nearest to it in a gallery, or among the others, nearest first."""
    found = []
    for i, o in enumerate(old):
        rows = [r for j, r in enumerate(old) if j != i] if gallery is None else gallery
        found.append(sorted(rows, key=lambda r: -float(o @ r))[:count])
    return found


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def csd_losses(new_emb, old_emb, gallery, top_k, temperature, old_temperature):
    new, old = ([unit(row) for row in rows] for rows in (new_emb, old_emb))
    gallery = None if gallery is None else [unit(row) for row in gallery]
    losses = []
    for n, o, near in zip(new, old, neighbours(old, gallery, top_k - 1), strict=True):
        context = [o, *near]
        p = softmax([float(o @ g) / old_temperature for g in context])
        losses.append(divergence(p, softmax([float(n @ g) / temperature for g in context])))
    return losses


def ssp_losses(new_emb, old_emb, codebooks, scale):
    """Codebooks ``[part][anchor]`` as the loss holds them."""
    losses, width = [], len(codebooks[0][0])
    for n, o in zip(map(unit, new_emb), map(unit, old_emb), strict=True):
        parts = []
        for m, book in enumerate(codebooks):
            part = slice(m * width, (m + 1) * width)
            p, q = (softmax([scale * len(codebooks) * float(row[part] @ c) for c in book]) for row in (o, n))
            parts.append(divergence(p, q))
        losses.append(sum(parts) / len(parts))
    return losses


def d3still_terms(new_emb, old_emb, gallery, top_k, weights):
    """Mean point term, and those of pairs in another order and in the same, multiplied by ``weights``."""
    new, old = ([unit(row) for row in rows] for rows in (new_emb, old_emb))
    gallery = None if gallery is None else [unit(row) for row in gallery]
    totals = [0.0, 0.0, 0.0]
    for n, o, near in zip(new, old, neighbours(old, gallery, top_k - 1), strict=True):
        squares = [0.0, 0.0]
        for one in near:
            for other in near:
                was, now = float(o @ one) - float(o @ other), float(n @ one) - float(n @ other)
                squares[0 if was * now < 0 else 1] += ((now - was) / (0.1 + abs(was))) ** 2
        totals[0] += 1 - float(n @ o)
        for place, total in enumerate(squares, 1):
            totals[place] += math.sqrt(total / max(1, len(near)) ** 2)
    return [weight * total / len(new) for weight, total in zip(weights, totals, strict=True)]


def simplex(count):
    n = count - 1
    corners = [[float(i == j) for j in range(n)] for i in range(n)] + [[(1 - math.sqrt(1 + n)) / n] * n]
    middle = [sum(column) / count for column in zip(*corners, strict=True)]
    return [unit([x - m for x, m in zip(corner, middle, strict=True)]) for corner in corners]


def softmax(logits):
    top = max(logits)
    exponentials = [math.exp(z - top) for z in logits]
    return [e / sum(exponentials) for e in exponentials]


def lwf_losses(new_logits, old_logits, temperature, old_temperature):
    losses = []
    for new, old in zip(new_logits, old_logits, strict=True):
        p, q = softmax([z / old_temperature for z in old]), softmax([z / temperature for z in new])
        losses.append(-sum(a * math.log(b) for a, b in zip(p, q, strict=True)))
    return losses


def nearest_has_the_label(embeddings, labels):
    right = []
    for i, row in enumerate(embeddings):
        others = [j for j in range(len(embeddings)) if j != i]
        nearest = max(others, key=lambda j: float(unit(row) @ unit(embeddings[j])), default=None)
        right.append(nearest is not None and labels[nearest] == labels[i])
    return right


def focal_distillation_losses(distances, right, alpha, beta):
    return [(alpha + (beta if r else 0.0)) * d for d, r in zip(distances, right, strict=True)]


def class_balls(embeddings, labels, normalize=True):
    """Return {label: (mean of the unit rows, largest distance to it within 1.5 IQR, count, every distance)}."""
    result = {}
    for label in sorted(set(labels.tolist())):
        own = [unit(e) if normalize else e for e, y in zip(embeddings, labels.tolist(), strict=True) if y == label]
        mean, n = sum(own) / len(own), len(own)
        distances = sorted(math.sqrt(sum((a - b) ** 2 for a, b in zip(e, mean, strict=True))) for e in own)
        q1, q3 = distances[n // 4], distances[3 * n // 4]
        kept = [d for d in distances if n < 4 or d <= q3 + 1.5 * (q3 - q1)]
        result[label] = (mean, max(kept), n, distances)
    return result


def advbct_adversarial(new, old, state, progress):
    """One loss a row: the cross-entropies of the new row as class 0 and the old row as class 1, times 1 - p."""
    rows = [*new, *old]
    hidden = [state["0.weight"] @ row + state["0.bias"] for row in rows]
    for unit_number in range(len(hidden[0])):
        values = [h[unit_number] for h in hidden]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + 1e-5)
        for h in hidden:
            normal = (h[unit_number] - mean) / spread
            h[unit_number] = max(0.0, normal * state["1.weight"][unit_number] + state["1.bias"][unit_number])
    losses = [
        cross_entropy([float(z) for z in state["3.weight"] @ h + state["3.bias"]], int(i >= len(new)))
        for i, h in enumerate(hidden)
    ]
    return [(1 - progress) * (losses[i] + losses[i + len(new)]) for i in range(len(new))]


def advbct_boundary(new, labels, balls, elasticity, threshold):
    """{row: how far its unit embedding lies outside the elastic boundary}, for labels of ``balls``."""
    result = {}
    for i, (row, label) in enumerate(zip(new, labels.tolist(), strict=True)):
        if label not in balls:
            continue
        center, radius = balls[label]
        delta = abs(radius - threshold) / (1 + math.exp(-elasticity[label]))
        elastic = radius + delta if radius < threshold else radius - delta
        result[i] = max(0.0, float(np.linalg.norm(unit(row) - center)) - elastic)
    return result


def credible_nearest(embeddings, labels, share):
    kept = [False] * len(embeddings)
    for label in set(labels.tolist()):
        own = [i for i, y in enumerate(labels.tolist()) if y == label]
        mean = sum(unit(embeddings[i]) for i in own) / len(own)
        own.sort(key=lambda i: np.linalg.norm(unit(embeddings[i]) - mean))
        for i in own[: math.ceil(round(share * len(own), 6))]:
            kept[i] = True
    return kept


def credible_entropies(embeddings, labels):
    """The entropy of exp(-|e - m_c|^2 / v_c), normalised over the classes, of each row."""
    balls = class_balls(embeddings, labels)
    overall = sum(d**2 for *_, distances in balls.values() for d in distances) / len(embeddings)
    result = []
    for e in embeddings:
        weights = []
        for mean, _, count, distances in balls.values():
            variance = sum(d**2 for d in distances) / count or overall
            weights.append(math.exp(-(np.linalg.norm(unit(e) - mean) ** 2) / variance))
        shares = [w / sum(weights) for w in weights]
        result.append(-sum(p * math.log(p) for p in shares if p > 0))
    return result


def fastfill_losses(mapped, target, log_variances, kind):
    """The negative log-likelihood of each target under a Gaussian, less its constant, divided by the width."""
    losses = []
    for h, f, s in zip(mapped, target, log_variances, strict=True):
        if kind == "unit":
            h, f = unit(h), unit(f)
        variance, width = math.exp(s), len(h)
        squared = sum((a - b) ** 2 for a, b in zip(f, h, strict=True))
        losses.append((squared / (2 * variance) + width / 2 * math.log(variance)) / width)
    return losses


def basis_transformation(trunk, weight, bias, free_rotation, old_rotation, scale):
    """Return (z, f, t) of each row of a trunk's output: the embedding, its free part and its old part, both unit."""
    result = []
    for u in trunk:
        free = unit(u[: len(free_rotation)])
        extra = unit(np.array([float(w @ np.maximum(u, 0)) + float(b) for w, b in zip(weight, bias, strict=True)]))
        v = np.concatenate([extra, scale * (free @ free_rotation)])
        old = v[: len(old_rotation)] @ old_rotation
        result.append((np.concatenate([old, v[len(old_rotation) :]]), free, unit(old)))
    return result


def compatible_head(features, state, free, training, eps=1e-5):
    """Return (p, f) of each row; ``state`` is of ``head.compatible``, ``free`` the weight and bias of g, or None."""
    hidden = [state["0.weight"] @ u for u in features]
    for j in range(len(hidden[0])):
        mean, variance = state["1.running_mean"][j], state["1.running_var"][j]
        if training and len(features) > 1:
            mean = sum(h[j] for h in hidden) / len(hidden)
            variance = sum((h[j] - mean) ** 2 for h in hidden) / len(hidden)
        for h in hidden:
            h[j] = max(0.0, (h[j] - mean) / math.sqrt(variance + eps) * state["1.weight"][j] + state["1.bias"][j])
    part = [state["3.weight"] @ h + state["3.bias"] for h in hidden]
    return part, [u if free is None else free[0] @ u + free[1] for u in features]


def compatible_head_terms(part, targets, labels, temperature):
    """Return the added terms before their weights, one number a row."""
    points, contrasts = [], []
    for p, t, y in zip(part, targets, labels, strict=True):
        points.append(sum((a - b) ** 2 for a, b in zip(unit(p), t, strict=True)))
        logits = [float(unit(p) @ other) / temperature for other in targets]
        positives = [cross_entropy(logits, j) for j in range(len(targets)) if labels[j] == y]
        contrasts.append(sum(positives) / len(positives))
    return points, contrasts


def within_class_whitening(embeddings, labels, shrinkage):
    """Return the mean of the unit rows, and the inverse square root of their shrunk scatter within classes."""
    rows = [unit(e) for e in embeddings]
    width, scatter = len(rows[0]), np.zeros((len(rows[0]), len(rows[0])))
    for label in set(labels):
        own = [row for row, y in zip(rows, labels, strict=True) if y == label]
        for row in own:
            apart = row - sum(own) / len(own)
            scatter += np.outer(apart, apart) / len(rows)
    scatter += shrinkage * sum(scatter[j][j] for j in range(width)) / width * np.eye(width)
    left, values, _ = np.linalg.svd(scatter)
    return sum(rows) / len(rows), sum(np.outer(u, u) / math.sqrt(v) for u, v in zip(left.T, values, strict=True))


def gradient_balance(calls):
    """Return the multiplier from pairs of gradients, the task's and the term's, one row a sample, of each call."""
    task_length, term_length = 0.0, 0.0
    for task, term in calls:
        for own, other in zip(task, term, strict=True):
            if any(x != 0 for x in other):
                task_length += math.sqrt(sum(float(x) ** 2 for x in own))
                term_length += math.sqrt(sum(float(x) ** 2 for x in other))
    return task_length / term_length if task_length > 0 and term_length > 0 else 1.0


def direction_losses(embeddings, labels, directions):
    """1 - cos to the direction of its class, ``directions`` by label; samples of other labels do not count."""
    losses = []
    for embedding, label in zip(embeddings, labels, strict=True):
        if label in directions:
            length = np.linalg.norm(embedding) * np.linalg.norm(directions[label])
            losses.append(1.0 - (float(embedding @ directions[label]) / length if length else 0.0))
    return losses


def mixbct_draws(new, old, labels, seen):
    """1 - cos of each new row to C^-1/2 times the mean of its class; to its old row where ``seen`` is None.

    ``seen`` are pairs of old rows and labels, of this call and of those before; C is of the first 1, 2, 4, ... of them.
    """
    losses = []
    if seen is not None:
        known = [(unit(row), c) for rows, classes in seen for row, c in zip(rows, classes, strict=True)]
        calls = 2 ** int(math.log2(len(seen)))
        rows = np.array([unit(row) for rows, _ in seen[:calls] for row in rows])
        values, axes = np.linalg.eigh(rows.T @ rows / len(rows))
        values = np.maximum(values, 1e-3 * values.mean())
        whitening = axes @ np.diag(values**-0.5) @ axes.T
    for f, o, y in zip(new, old, labels, strict=True):
        aim = unit(o) if seen is None else unit(whitening @ sum(row for row, c in known if c == y))
        losses.append(1.0 - float(unit(f) @ aim))
    return losses


def found_by(queries, query_classes, gallery, classes):
    """P@1 and mAP of queries with another row of their class to find; row i of the gallery is query i's own."""
    first, average = [], []
    for i, (query, wanted) in enumerate(zip(queries, query_classes, strict=True)):
        others = sorted((j for j in range(len(gallery)) if j != i), key=lambda j: -float(query @ gallery[j]))
        hits = [classes[j] == wanted for j in others]
        if not any(hits):
            continue
        first.append(float(hits[0]))
        precisions = [sum(hits[: k + 1]) / (k + 1) for k, hit in enumerate(hits) if hit]
        average.append(sum(precisions) / len(precisions))
    return sum(first) / max(1, len(first)), sum(average) / max(1, len(average))
