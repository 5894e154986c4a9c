"""Shampoo and SOAP for one matrix in plain float64 NumPy, to hold the JAX optimizers against.

Written from the papers and from what the public implementations compute, with no sharing, no
batching and no attention to cost; test_shampoo_reference.py holds it against their trajectories.
Every `direction(g)` is the positive direction: a step is `param -= rate * direction`.
"""

import json
from pathlib import Path

import numpy as np

ORACLES = Path(__file__).resolve().parent / 'oracles'


def load(package):
    """(name -> settings of a run, name -> array) of a recorded package.

    The array of a run's own name holds the parameters after each step.
    """
    with np.load(ORACLES / f'{package}.npz') as file:
        arrays = dict(file)
    return json.loads(str(arrays.pop('header')))['runs'], arrays


def inputs(run):
    """Initial parameters and the gradient of every step of a recorded run, in its dtype.

    The legacy generator, because only its stream is promised never to change. Rows and columns
    differ in scale so that the factors are no multiple of the identity, and the gradients share
    a mean so that the momentum has something to find.
    """
    random = np.random.RandomState(run['seed'])
    rows, columns = run['shape']
    param = random.standard_normal((rows, columns))
    mean = random.standard_normal((rows, columns))
    noise = random.standard_normal((run['steps'], rows, columns))
    scales = np.outer(1 / (1 + np.arange(rows) % 3), 1 / (1 + np.arange(columns) % 4))
    grads = run['scale'] * (0.5 * mean + noise) * scales
    # The recorded numbers would tell too, but not where to look.
    np.testing.assert_allclose(grads[0, 0, :2], run['first_gradient'], rtol=1e-6)
    return param.astype(run['dtype']), grads.astype(run['dtype'])


def cuts(shape, block):
    """Slices of the blocks: block, block, ..., remainder along both axes."""
    spans = [[slice(at, min(at + block, size)) for at in range(0, size, block)] for size in shape]
    return [(rows, columns) for rows in spans[0] for columns in spans[1]]


def inverse_root(a, p, ridge=0.0, floor=0.0):
    """(a + ridge * max(lambda_max, floor) * I) ** (-1/p) of a symmetric matrix; any real p."""
    values, vectors = np.linalg.eigh((a + a.T) / 2)
    # Rounding may leave a null direction slightly negative.
    values = np.maximum(values, 0) + ridge * max(values[-1], floor)
    return (vectors * values ** (-1 / p)) @ vectors.T


def due(step, start, every):
    """Are the roots computed at this step (counted from one)? Meta's rule.

    At `start` whatever it is, afterwards at the multiples of `every`, not of `start + every`.
    """
    return step == start or (step > start and step % every == 0)


class Shampoo:
    """Shampoo in Meta's order: the filtered gradient is preconditioned, then grafted.

    A step updates the statistics with the raw gradient, computes the roots if `due`, and only
    then applies them. `exponent` is the power of each factor. Before `start` the update is the
    graft's own; without a graft it is the filtered gradient, since the roots begin as identity.
    `graft` 'rms' differs from 'adam' only in that its second moment is not bias corrected.
    """

    def __init__(
        self,
        shape,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        ridge=0.0,
        exponent=-0.25,
        every=1,
        start=1,
        nesterov=False,
        graft='adam',
        b2_graft=None,
    ):
        self.b1, self.b2, self.b2_graft = b1, b2, b2 if b2_graft is None else b2_graft
        self.eps, self.ridge, self.exponent = eps, ridge, exponent
        self.every, self.start, self.nesterov, self.graft = every, start, nesterov, graft
        self.step = 0
        self.left, self.right = (np.zeros((size, size)) for size in shape)
        self.left_root, self.right_root = (np.eye(size) for size in shape)
        self.mean, self.square = np.zeros(shape), np.zeros(shape)

    def filtered(self, g):
        """The bias-corrected average of gradients; with nesterov it looks one step ahead."""
        # Meta calls b3 `beta3`. Weights of all gradients so far sum to 1 - b3 * b1**(step - 1),
        # which is 1 - b1**step for plain and 1 - b1**(step + 1) for nesterov.
        b3 = self.b1**2 if self.nesterov else self.b1
        ahead = b3 * self.mean + (1 - b3) * g
        self.mean = self.b1 * self.mean + (1 - self.b1) * g
        return ahead / (1 - b3 * self.b1 ** (self.step - 1))

    def grafted(self, mean):
        if self.graft in (None, 'sgd'):
            return mean
        unbias = 1 - self.b2_graft**self.step if self.graft == 'adam' else 1.0
        return mean / (np.sqrt(self.square / unbias) + self.eps)

    def direction(self, g):
        self.step += 1
        self.left = self.b2 * self.left + (1 - self.b2) * g @ g.T
        self.right = self.b2 * self.right + (1 - self.b2) * g.T @ g
        self.square = self.b2_graft * self.square + (1 - self.b2_graft) * g**2
        if due(self.step, self.start, self.every):
            unbias = 1 - self.b2**self.step
            self.left_root, self.right_root = (
                inverse_root(factor / unbias, -1 / self.exponent, self.ridge)
                for factor in (self.left, self.right)
            )
        mean = self.filtered(g)
        graft = self.grafted(mean)
        if self.graft and self.step < self.start:
            return graft
        update = self.left_root @ mean @ self.right_root
        if self.graft:
            update *= np.linalg.norm(graft) / (np.linalg.norm(update) + 1e-16)
        return update


class MomentumFirst:
    """Shampoo in Google's order: the raw gradient is preconditioned and grafted, then averaged.

    Steps count from zero: statistics are updated at multiples of `stats_every`, roots computed
    at multiples of `every`, step zero included and `start` disregarded. `start` only says which
    of the two momenta is used; both advance at every step. Nothing is bias corrected, and the
    factors begin as `ridge` times the identity. The graft's norm is that of the whole matrix,
    whatever its blocks. `decay` is the coupled one, inside the momentum; so is a `rate` given to
    `direction`, which scales the gradient's part only (their decoupled_learning_rate=False).
    `absolute` adds the ridge as it is, not times the largest eigenvalue.
    """

    def __init__(
        self,
        shape,
        b1=0.9,
        b2=0.999,
        eps=1e-10,
        ridge=1e-6,
        exponent=-0.25,
        every=1,
        stats_every=1,
        start=5,
        nesterov=True,
        moving_average=False,
        graft='sgd',
        clip=None,
        decay=0.0,
        block=None,
        absolute=False,
    ):
        self.absolute = absolute
        self.b1, self.b2, self.eps, self.ridge, self.exponent = b1, b2, eps, ridge, exponent
        self.every, self.stats_every, self.start = every, stats_every, start
        self.nesterov, self.average = nesterov, moving_average
        self.graft, self.clip, self.decay = graft, clip, decay
        self.step = 0
        self.cuts = cuts(shape, block or max(shape))
        sizes = [np.zeros(shape)[cut].shape for cut in self.cuts]
        self.factors = [[ridge * np.eye(size) for size in sides] for sides in sizes]
        self.roots = [[np.eye(size) for size in sides] for sides in sizes]
        self.square = np.zeros(shape)
        self.momentum, self.graft_momentum = np.zeros(shape), np.zeros(shape)

    def grafted(self, g):
        if self.graft in (None, 'sgd'):
            return g
        if self.graft == 'sign':
            return np.sign(g)
        if self.graft.endswith('_normalized'):
            g = g / (np.linalg.norm(g) + 1e-16)
        if self.graft.startswith('adagrad') or self.b2 == 1:
            self.square = self.square + g**2
        else:
            self.square = self.b2 * self.square + (1 - self.b2) * g**2
        update = g / (np.sqrt(self.square) + self.eps)
        if self.clip and self.graft.startswith('rms'):
            rms = np.linalg.norm(update) / np.sqrt(update.size)
            update = update / max(1.0, rms / self.clip)
        return update

    def precondition(self, g):
        update = np.empty_like(g)
        for cut, (left, right) in zip(self.cuts, self.roots, strict=True):
            update[cut] = left @ g[cut] @ right
        return update

    def root(self, factor):
        p = -1 / self.exponent
        if self.absolute:
            return inverse_root(factor + self.ridge * np.eye(len(factor)), p)
        return inverse_root(factor, p, self.ridge, floor=1e-6)

    def direction(self, g, param=0.0, rate=1.0):
        step, self.step = self.step, self.step + 1
        new = 1.0 if self.b2 == 1 else 1 - self.b2
        if step % self.stats_every == 0:
            for cut, sides in zip(self.cuts, self.factors, strict=True):
                grams = g[cut] @ g[cut].T, g[cut].T @ g[cut]
                sides[:] = (self.b2 * a + new * b for a, b in zip(sides, grams, strict=True))
        if step % self.every == 0:
            self.roots = [[self.root(factor) for factor in sides] for sides in self.factors]
        graft = rate * self.grafted(g)
        update = self.precondition(g)
        if self.graft:
            update *= np.linalg.norm(graft) / (np.linalg.norm(update) + 1e-16)
        update, graft = update + self.decay * param, graft + self.decay * param
        weight = 1 - self.b1 if self.average else 1.0
        self.momentum = self.b1 * self.momentum + weight * update
        self.graft_momentum = self.b1 * self.graft_momentum + weight * graft
        started = step >= self.start
        momentum = self.momentum if started else self.graft_momentum
        if self.nesterov:
            return weight * (update if started else graft) + self.b1 * momentum
        return momentum


class Soap:
    """SOAP: Adam in the eigenbasis of Shampoo's factors (arXiv 2409.11321 and its torch code).

    The first gradient only makes the basis, by eigh, and updates nothing; `step` counts from the
    second. A basis is made *after* an update and used from the next one, so no gradient is ever
    rotated by itself. The momentum is kept in the original basis and rotated when it is used
    (the paper); the torch code stores it rotated but turns it back before each change of basis,
    which is the same. Gradients are not normalised and both moments are bias corrected, with the
    torch code's eps, which is added before the correction of the second moment.
    """

    def __init__(self, shape, b1=0.95, b2=0.95, eps=1e-8, every=10, b_stats=None):
        self.b1, self.b2, self.eps, self.every = b1, b2, eps, every
        self.b_stats = b2 if b_stats is None else b_stats
        self.step = -1
        self.factors = [np.zeros((size, size)) for size in shape]
        self.bases = None
        self.mean, self.square = np.zeros(shape), np.zeros(shape)

    def learn(self, g):
        grams = g @ g.T, g.T @ g
        self.factors = [
            self.b_stats * factor + (1 - self.b_stats) * gram
            for factor, gram in zip(self.factors, grams, strict=True)
        ]

    def refresh(self):
        """One power iteration and QR, columns first sorted by their estimated eigenvalue."""
        for axis, (factor, basis) in enumerate(zip(self.factors, self.bases, strict=True)):
            order = np.argsort(-np.diag(basis.T @ factor @ basis))
            # The second moment belongs to the columns, so it is moved with them.
            self.square = np.take(self.square, order, axis)
            self.bases[axis] = np.linalg.qr(factor @ basis[:, order])[0]

    def direction(self, g):
        self.step += 1
        if self.step == 0:
            self.learn(g)
            self.bases = [np.linalg.eigh(factor)[1][:, ::-1] for factor in self.factors]
            return np.zeros_like(g)
        left, right = self.bases
        self.mean = self.b1 * self.mean + (1 - self.b1) * g
        self.square = self.b2 * self.square + (1 - self.b2) * (left.T @ g @ right) ** 2
        update = left.T @ self.mean @ right / (np.sqrt(self.square) + self.eps)
        update *= np.sqrt(1 - self.b2**self.step) / (1 - self.b1**self.step)
        update = left @ update @ right.T
        self.learn(g)
        if self.step % self.every == 0:
            self.refresh()
        return update
