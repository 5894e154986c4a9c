"""Figures: panels are there for what the runs have."""

from big_vit.inspection import plots


def titles(rows):
    return [axis.get_title() for axis in plots.curves({'': rows}).figure.axes]


def test_curves_have_no_empty_panels_and_no_ranks_among_accuracies():
    trained = [{'step': i, 'train/loss': 1 / i, 'train/lr': 0.1} for i in (1, 2)]
    measured = [{'step': i, 'x/rankme': 3.0 + i, 'x/std': 0.5} for i in (1, 2)]
    near = [{'step': i, 'near/10nn': 0.1 * i} for i in (1, 2)]
    assert titles(trained) == ['loss', 'learning rate']
    assert titles(trained + measured) == ['loss', 'rank of the features', 'learning rate']
    both = ['loss', 'accuracy', 'rank of the features', 'learning rate']
    assert titles(trained + measured + near) == both
    _, accuracy, rank, _ = plots.curves({'': trained + measured + near}).figure.axes
    assert [line.get_ydata().tolist() for line in accuracy.lines] == [[0.1, 0.2]]
    assert [line.get_ydata().tolist() for line in rank.lines] == [[4.0, 5.0]]
