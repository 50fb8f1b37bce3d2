"""The algebra of the svd strategy: averages of the products B A, computed from the factors."""

import numpy as np
import torch


def deal_layers(shapes, num_ranks):
    """Deal the LoRA pairs out to the ranks: (layers, sizes).

    `shapes` are those of all LoRA tensors, A (r, k) before B (d, r). layers[rank] lists that rank's pairs of shapes,
    sizes[rank] is how many numbers they have.
    """
    pairs = list(zip(shapes[::2], shapes[1::2]))
    layers = [[pairs[i] for i in part] for part in np.array_split(np.arange(len(pairs)), num_ranks)]
    sizes = [sum(a.numel() + b.numel() for a, b in part) for part in layers]
    return layers, sizes


def layer_factors(values, layers):
    """Yield A (clients, r, k) and B (clients, d, r) of each layer in `values` (clients, C)."""
    for shape_a, shape_b in layers:
        size_a, size_b = shape_a.numel(), shape_b.numel()
        yield values[:, :size_a].view(-1, *shape_a), values[:, size_a : size_a + size_b].view(-1, *shape_b)
        values = values[:, size_a + size_b :]


def project_product(a, b, weights):
    """Return the factors (r, k) and (d, r) of the best rank-r approximation of sum_i weights[i] b[i] @ a[i].

    By QR of the stacked factors and an SVD of the small core, in float64. Of all factors with that product, it takes
    those nearest to the mean ones: A with orthogonal rows, as long as the mean A, turned so that AdamW's moments still
    fit.
    """
    n, r, k = a.shape
    a, b = a.double(), b.double()
    weighted = weights[:, None, None] * a
    left_q, left_r = torch.linalg.qr(b.transpose(0, 1).reshape(-1, n * r))
    right_q, right_r = torch.linalg.qr(weighted.reshape(n * r, k).T)
    u, s, v = torch.linalg.svd(left_r @ right_r.T)
    new_b = left_q @ u[:, : len(s)] * s
    new_a = v[: len(s)] @ right_q.T
    new_b, new_a = rows_of_rank(new_b.T, r).T, rows_of_rank(new_a, r)

    mean_a, mean_b = weighted.sum(0), (weights[:, None, None] * b).sum(0)
    scale = torch.linalg.matrix_norm(mean_a).clamp_min(1e-12) / r**0.5  # B takes the singular values
    new_a, new_b = new_a * scale, new_b / scale
    u, _, v = torch.linalg.svd(new_a @ mean_a.T + new_b.T @ mean_b)
    turn = u @ v  # orthogonal: brings the factors nearest to the mean ones
    return (turn.T @ new_a).float(), (new_b @ turn).float()


def rows_of_rank(factor, r):
    """Return the first r rows, with rows of zeros where the factor has fewer."""
    return torch.nn.functional.pad(factor, (0, 0, 0, r))[:r]


def squared_product_norm(a, b, weights):
    """Return ||sum_i weights[i] b[i] @ a[i]||^2 (Frobenius), from A (clients, r, k) and B (clients, d, r).

    By Gram matrices of the factors, or densely where those would be larger.
    """
    left = (weights[:, None, None] * b).transpose(0, 1).flatten(1)  # (d, clients r)
    right = a.flatten(0, 1)  # (clients r, k)
    (d, stacked), k = left.shape, right.shape[1]
    if stacked * (d + k) > d * k:
        return (left @ right).square().sum()
    return ((left.T @ left) * (right @ right.T)).sum()
