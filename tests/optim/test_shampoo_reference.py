"""The NumPy references against recorded trajectories of the public implementations.

Nothing of big_vit is imported: what is proved here is what the package's tests measure with.
"""

import numpy as np
import pytest
from shampoo_reference import MomentumFirst, Shampoo, Soap, cuts, due, inputs, inverse_root, load

META, META_PARAMS = load('meta')
SOAP, SOAP_PARAMS = load('soap')
# How far, of the way the parameters go, the recorded ones may be off.
GOOGLE = {'optax_shampoo_f32': 3e-4, 'optax_shampoo_f64': 2e-7, 'precondition': 2e-7}
GRAFTS = {'Adam': 'adam', 'RMSprop': 'rms', 'SGD': 'sgd', 'none': None}
GOOGLE_GRAFTS = {
    'NONE': None,
    'SGD': 'sgd',
    'SQRT_N': 'sign',
    'RMSPROP': 'rms',
    'RMSPROP_NORMALIZED': 'rms_normalized',
    'ADAGRAD': 'adagrad',
    'ADAGRAD_NORMALIZED': 'adagrad_normalized',
}


def follow(run, step):
    """Parameters after each step of a recorded run, in float64; `step(param, grad)` moves them."""
    param, grads = (array.astype('float64') for array in inputs(run))
    params = []
    for grad in grads:
        param = step(param, grad)
        params.append(param)
    return np.stack(params)


@pytest.mark.parametrize('name', META)
def test_shampoo_is_metas(name):
    run, told = META[name], META[name]['arguments']
    (b1, b2), b3 = told['betas'], told['beta3']
    assert b3 in (-1, b1**2)
    blocks = cuts(run['shape'], told['max_preconditioner_dim'])
    optimizers = [
        Shampoo(
            np.zeros(run['shape'])[block].shape,
            b1,
            b2,
            told['grafting_epsilon'],
            # Theirs is absolute, 1e-30 here: nothing beside eigenvalues of 1e-20 and more.
            ridge=0.0,
            exponent=-told['inverse_exponent'],
            every=told['precondition_frequency'],
            start=told['start_preconditioning_step'],
            nesterov=b3 == b1**2,
            graft=GRAFTS[told['grafting']],
            b2_graft=told['grafting_beta2'],
        )
        for block in blocks
    ]

    def step(param, grad):
        update = told['weight_decay'] * param
        for block, optimizer in zip(blocks, optimizers, strict=True):
            update[block] += optimizer.direction(grad[block])
        return param - told['lr'] * update

    np.testing.assert_allclose(follow(run, step), META_PARAMS[name], rtol=0, atol=1e-12)


# Their root is a Newton iteration stopped at an error of 1e-6, in float32 with a ridge of 1e-6.
@pytest.mark.parametrize(
    ('package', 'name', 'tolerance'),
    [
        pytest.param(package, name, tolerance, id=f'{package}-{name}')
        for package, tolerance in GOOGLE.items()
        for name in load(package)[0]
    ],
)
def test_momentum_first_is_googles(package, name, tolerance):
    runs, recorded = load(package)
    run, told = runs[name], runs[name]['arguments']
    rate, decoupled = told['learning_rate'], told['decoupled_weight_decay']
    optimizer = MomentumFirst(
        run['shape'],
        told['beta1'],
        told['beta2'],
        told['diagonal_epsilon'],
        told['matrix_epsilon'],
        -1 / (told['exponent_override'] or 4),
        told['preconditioning_compute_steps'],
        told['statistics_compute_steps'],
        told['start_preconditioning_step'],
        told['nesterov'],
        told['moving_average_for_momentum'],
        GOOGLE_GRAFTS[told['graft_type']],
        told['clip_by_scaled_gradient_norm'],
        0.0 if decoupled else told['weight_decay'],
        told['block_size'],
        not told['relative_matrix_epsilon'],
    )

    def step(param, grad):
        decay = told['weight_decay'] * param if decoupled else 0.0
        if not told['decoupled_learning_rate']:
            return param - optimizer.direction(grad, param, rate) - rate * decay
        # The decoupled decay meets the rate twice in the older package.
        twice = rate if package.startswith('optax_shampoo') else 1.0
        return param - rate * (optimizer.direction(grad, param) + twice * decay)

    params = follow(run, step)
    moved = np.abs(params - inputs(run)[0]).max()
    np.testing.assert_allclose(params, recorded[name], rtol=0, atol=tolerance * moved)


@pytest.mark.parametrize('name', SOAP)
def test_soap_is_the_authors(name):
    run, told = SOAP[name], SOAP[name]['arguments']
    b_stats = told['shampoo_beta']
    optimizer = Soap(
        run['shape'],
        *told['betas'],
        told['eps'],
        told['precondition_frequency'],
        None if b_stats < 0 else b_stats,
    )

    def step(param, grad):
        first = optimizer.bases is None
        param = param - told['lr'] * optimizer.direction(grad)
        if first and name == 'rectangular':
            optimizer.bases = [SOAP_PARAMS[f'{name}_{side}'] for side in ('left', 'right')]
        # Theirs decays what the step has already moved, and not at the first gradient.
        return param if first else param - told['lr'] * told['weight_decay'] * param

    np.testing.assert_allclose(follow(run, step), SOAP_PARAMS[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize('p', [1, 2, 3, 4, 1.7])
def test_inverse_root_undoes_a_power(p):
    random = np.random.RandomState(0)
    basis = np.linalg.qr(random.standard_normal((6, 6)))[0]
    values = np.array([1.0, 2.0, 3.0, 5.0, 8.0, 13.0])
    np.testing.assert_allclose(
        inverse_root((basis * values**p) @ basis.T, p), (basis / values) @ basis.T, atol=1e-12
    )
    # The ridge is relative, so a root of c * A is the root of A over c ** (1/p).
    singular = (basis[:, :2] * values[:2]) @ basis[:, :2].T
    np.testing.assert_allclose(
        inverse_root(1e-9 * singular, p, 1e-3),
        inverse_root(singular, p, 1e-3) * 1e9 ** (1 / p),
        rtol=1e-9,
        atol=1e-9,
    )


def test_roots_are_computed_at_start_and_then_at_multiples():
    assert [step for step in range(1, 14) if due(step, 3, 3)] == [3, 6, 9, 12]
    assert [step for step in range(1, 14) if due(step, 4, 3)] == [4, 6, 9, 12]
    assert [step for step in range(1, 6) if due(step, 1, 1)] == [1, 2, 3, 4, 5]
