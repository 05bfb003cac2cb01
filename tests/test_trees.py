"""Trees of parameters by path."""

from mdt_jax.convert import trees

TREE = {"encoder": {"conv_in": {"kernel": 1, "bias": 2}}, "label_embed": 3}
LEAVES = {"encoder/conv_in/kernel": 1, "encoder/conv_in/bias": 2, "label_embed": 3}


def test_flattening_and_nesting_are_inverses():
    assert dict(trees.flatten(TREE)) == LEAVES
    assert list(dict(trees.flatten(TREE))) == list(LEAVES)
    assert trees.nest(LEAVES) == TREE


def test_a_path_leads_to_a_leaf_a_branch_or_nothing():
    assert trees.get(TREE, "label_embed") == 3
    assert trees.get(TREE, "encoder/conv_in") == {"kernel": 1, "bias": 2}
    assert trees.get(TREE, "encoder/conv_out/kernel") is None
    assert trees.get(TREE, "label_embed/kernel") is None


def test_putting_makes_the_branches():
    tree = {"encoder": {"bias": 2}}
    trees.put(tree, "encoder/conv_in/kernel", 1)
    assert tree == {"encoder": {"bias": 2, "conv_in": {"kernel": 1}}}
