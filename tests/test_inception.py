"""The FID Inception-v3 against a PyTorch port's features, and its weights from every kind of file.

The graph's own file is not here. Its reader is tested on graphs with its node names that protobuf's
own classes, as tensorboardX ships them, write.
"""

from __future__ import annotations

import ast
import functools
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import DATA
from flax import linen as nn
from tensorboardX.proto import graph_pb2, types_pb2

from mdt_jax.commands import convert_checkpoint
from mdt_jax.convert import graph_def, trees
from mdt_jax.convert import inception as convert
from mdt_jax.convert.architecture import UnknownWeights, identify
from mdt_jax.models import inception as network
from mdt_jax.models.inception import BlockC, InceptionOutputs, InceptionV3
from mdt_jax.weights import files as weight_files
from mdt_jax.weights import inception
from mdt_jax.weights.files import WeightsError

FEATURES = {
    "2048": "pool_3",
    "spatial": "spatial",
    "logits_unbiased": "logits_unbiased",
    "logits": "logits",
    "64": "features_64",
    "192": "features_192",
    "768": "features_768",
}


@functools.cache
def reference() -> dict[str, np.ndarray]:
    with np.load(DATA / "inception_fid.npz") as file:
        return dict(file)


@functools.cache
def shapes() -> dict[str, tuple[int, ...]]:
    return ast.literal_eval(str(reference()["state_dict_shapes"]))


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight by the reference's rule."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        noise = 1 + 0.1 * np.abs(noise)
    elif name.endswith("bn.weight"):
        noise = 1 + 0.1 * noise
    elif name.endswith(("bn.bias", "running_mean", "fc.bias")):
        noise = 0.1 * noise
    elif name == "fc.weight":
        noise = 0.02 * noise
    else:
        noise = noise * np.sqrt(2 / np.prod(shape[1:]))
    return noise.astype(np.float32)


@functools.cache
def state_dict() -> dict[str, np.ndarray]:
    return {name: draw(name, shape) for name, shape in shapes().items()}


def zeros(**changes: np.ndarray) -> dict[str, np.ndarray]:
    """A state dict that costs no memory, some of its arrays changed."""
    zero = np.float32(0)
    return {name: np.broadcast_to(zero, shape) for name, shape in shapes().items()} | changes


def without(name: str) -> dict[str, np.ndarray]:
    return {key: array for key, array in zeros().items() if key != name}


@functools.cache
def params() -> dict:
    return convert.from_torch(state_dict())


BLOCKS = ("Mixed_6e", "Mixed_7a", "Mixed_7b")


@functools.cache
def compiled():
    """The network, which also gives the results of some of its blocks."""
    apply = functools.partial(
        InceptionV3().apply, capture_intermediates=lambda module, _: module.name in BLOCKS
    )
    return jax.jit(lambda params, images: apply({"params": params}, images))


def run(images: np.ndarray) -> tuple[InceptionOutputs, dict[str, np.ndarray]]:
    outputs, state = compiled()(params(), images)
    blocks = {name: state["intermediates"][name]["__call__"][0] for name in BLOCKS}
    return jax.tree.map(np.asarray, (outputs, blocks))


@functools.cache
def outputs() -> tuple[InceptionOutputs, dict[str, np.ndarray]]:
    return run(reference()["images"])


def block_c(name: str, pool, x: np.ndarray) -> np.ndarray:
    """One of the last two blocks with a pool of its own."""
    return np.asarray(jax.jit(BlockC(pool).apply)({"params": params()[name]}, x))


def errors(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """The largest error by the largest value, and the error's norm by the values'."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    difference = ours - theirs
    return (
        float(np.abs(difference).max() / np.abs(theirs).max()),
        float(np.linalg.norm(difference) / np.linalg.norm(theirs)),
    )


@pytest.mark.parametrize("feature", FEATURES)
def test_features_are_the_references(feature):
    ours = getattr(outputs()[0], FEATURES[feature])
    theirs = reference()[f"feature/{feature}"]
    assert (ours.shape, ours.dtype) == (theirs.shape, np.float32)
    assert max(errors(ours, theirs)) < 1e-5


def test_the_resized_image_is_the_references():
    resized = np.asarray(network.resize(jnp.asarray(reference()["images"])))
    assert np.abs(resized[:, ::13, ::13] - reference()["resized_299"]).max() < 1e-3


def test_half_pixel_centres_would_show():
    images = reference()["images"].astype(np.float32)
    resized = jax.image.resize(images, (2, 299, 299, 3), "bilinear", antialias=False)
    assert np.abs(resized[:, ::13, ::13] - reference()["resized_299"]).max() > 1


def test_an_average_over_the_padding_would_show():
    padded = functools.partial(nn.avg_pool, window_shape=(3, 3), padding="SAME")
    x = block_c("Mixed_7b", padded, outputs()[1]["Mixed_7a"])
    faulty = block_c("Mixed_7c", network.max_pool, x).mean((1, 2))
    assert min(errors(faulty, reference()["feature/2048"])) > 1e-3


def test_an_average_in_the_last_block_would_show():
    faulty = block_c("Mixed_7c", network.average_pool, outputs()[1]["Mixed_7b"]).mean((1, 2))
    assert min(errors(faulty, reference()["feature/2048"])) > 1e-3


def test_the_spatial_features_of_the_next_block_would_show():
    assert min(errors(outputs()[1]["Mixed_6e"][..., :7], reference()["feature/spatial"])) > 0.1


@pytest.mark.parametrize("size", [(299, 299), (1, 1), (64, 200), (301, 37), (700, 598)])
def test_resize_interpolates_from_the_corner(size):
    height, width = size
    image = np.random.default_rng(0).integers(0, 256, (1, height, width, 1), np.uint8)

    def at(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The neighbours of each place and the second's part; TensorFlow's, in float32."""
        places = np.arange(299, dtype=np.float32) * np.float32(side / 299)
        lower = places.astype(int)
        return lower, np.minimum(lower + 1, side - 1), (places - lower).astype(np.float64)

    (y0, y1, dy), (x0, x1, dx) = at(height), at(width)
    rows = image[0, y0, :, 0] * (1 - dy)[:, None] + image[0, y1, :, 0] * dy[:, None]
    expected = rows[:, x0] * (1 - dx) + rows[:, x1] * dx
    resized = np.asarray(network.resize(jnp.asarray(image)))[0, ..., 0]
    assert np.abs(resized - expected).max() < 1e-3


def test_the_average_pool_leaves_the_padding_out():
    x = np.random.default_rng(0).standard_normal((1, 4, 5, 2)).astype(np.float32)
    expected = [
        [x[0, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean((0, 1)) for j in range(5)]
        for i in range(4)
    ]
    np.testing.assert_allclose(network.average_pool(jnp.asarray(x))[0], expected, atol=1e-6)


def test_an_images_place_in_a_batch_does_not_matter():
    swapped, _ = run(reference()["images"][::-1])
    for ours, theirs in zip(swapped, outputs()[0], strict=True):
        assert max(errors(ours[::-1], theirs)) < 1e-6


def test_a_grey_float_image_alone_has_the_features_of_its_rgb_bytes_among_others():
    images = np.repeat(reference()["images"][..., :1], 3, axis=-1)
    alone, _ = run(images[1:, ..., :1].astype(np.float32))
    among, _ = run(images)
    for ours, theirs in zip(alone, among, strict=True):
        assert max(errors(ours, theirs[1:])) < 1e-5


@pytest.mark.parametrize(
    "dtype, channels, said",
    [
        (jnp.bfloat16, 3, "images of type bfloat16"),
        (jnp.float16, 3, "images of type float16"),
        (jnp.int32, 3, "images of type int32"),
        (jnp.uint8, 4, "images of 4 channels"),
    ],
)
def test_images_of_other_types_or_channels_are_refused(dtype, channels, said):
    images = jax.ShapeDtypeStruct((1, 32, 32, channels), dtype)
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(InceptionV3().init, jax.random.key(0), images)


# Conversion.


def test_the_table_of_names_is_the_references_in_its_order():
    assert list(convert.state_dict_shapes().items()) == list(shapes().items())


def test_the_tree_is_the_networks():
    images = jnp.zeros((1, 32, 32, 3), jnp.uint8)
    tree = jax.eval_shape(InceptionV3().init, jax.random.key(0), images)["params"]
    ours = {path: leaf.shape for path, leaf in trees.flatten(params())}
    assert ours == {path: leaf.shape for path, leaf in trees.flatten(tree)}


def test_every_bit_comes_back():
    generator = np.random.default_rng(0)
    bits = {
        name: np.frombuffer(generator.bytes(4 * int(np.prod(shape))), np.float32).reshape(shape)
        for name, shape in shapes().items()
    }
    back = convert.to_torch(convert.from_torch(bits))
    assert list(back) == list(bits)
    for name, array in bits.items():
        np.testing.assert_array_equal(back[name].view(np.int32), array.view(np.int32), name)


def test_update_counters_are_passed_over():
    counted = zeros(**{"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros((), np.int64)})
    assert "num_batches_tracked" not in str(convert.from_torch(counted).keys())


@pytest.mark.parametrize(
    "weights, said",
    [
        (without("Mixed_6d.branch1x1.bn.bias"), r"'Mixed_6d.branch1x1.bn.bias' \(192,\)"),
        (zeros(**{"fc.scale": np.zeros(3, np.float32)}), "'fc.scale' is no weight"),
        (zeros(**{"fc.bias": np.zeros(7, np.float32)}), r"'fc.bias' is of shape \(7,\)"),
        (zeros(**{"fc.bias": np.zeros(1008, np.float16)}), "'fc.bias' is of type float16"),
        (zeros(**{"fc.weight": np.zeros((1000, 2048), np.float32)}), "torchvision's"),
        (zeros(**{"AuxLogits.fc.bias": np.zeros(1000, np.float32)}), "torchvision's"),
    ],
)
def test_other_weights_are_refused_by_name(weights, said):
    with pytest.raises(ValueError, match=said):
        convert.from_torch(weights)


def test_a_tree_that_lacks_a_parameter_is_refused_by_path():
    tree = convert.from_torch(zeros())
    del tree["fc"]["bias"]
    with pytest.raises(ValueError, match="'fc/bias'"):
        convert.to_torch(tree)


# The graph: its node names, as torch-fidelity's conversion has them.

_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
_TOWERS = {
    "branch1x1": "",
    "branch5x5": "tower/",
    "branch7x7": "tower/",
    "branch3x3dbl": "tower_1/",
    "branch7x7dbl": "tower_1/",
    "branch7x7x3": "tower_1/",
    "branch_pool": "tower_2/",
}
_NORM = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}


def node_name(name: str) -> str:
    """The graph's name of a weight of PyTorch's."""
    if name.startswith("fc."):
        return "softmax/weights" if name == "fc.weight" else "softmax/biases"
    *place, kind, array = name.split(".")
    array = "conv2d_params" if kind == "conv" else f"batchnorm/{_NORM[array]}"
    if place[0] in _STEM:
        return f"{_numbered('conv', _STEM.index(place[0]))}/{array}"
    block, (branch, _, step) = place[0].removeprefix("Mixed_"), place[1].rpartition("_")
    if not step.rstrip("ab").isdecimal():  # a branch of one convolution
        branch, step = place[1], "1"
    towers = _TOWERS | {"branch3x3": "" if block == "6a" else "tower/"}
    towers |= {"branch3x3dbl": "tower/"} if block == "6a" else {}
    if step[-1] in "ab":
        convolution = "mixed/" + _numbered("conv", "ab".index(step[-1]))
    else:
        convolution = _numbered("conv", int(step) - 1)
    return f"{_numbered('mixed', _BLOCKS.index(block))}/{towers[branch]}{convolution}/{array}"


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name


def add_constant(graph, name: str, array: np.ndarray, content: bool = True):
    node = graph.node.add(name=name, op="Const")
    node.attr["dtype"].type = types_pb2.DT_FLOAT
    tensor = node.attr["value"].tensor
    tensor.dtype = types_pb2.DT_FLOAT
    for side in array.shape:
        tensor.tensor_shape.dim.add(size=side)
    if content:
        tensor.tensor_content = np.ascontiguousarray(array, "<f4").tobytes()
    else:
        tensor.float_val.extend(array.ravel().tolist())
    return node


@functools.cache
def graph_bytes() -> bytes:
    """A graph of the weights with the original's names, and nodes of other kinds between them."""
    graph = graph_pb2.GraphDef(version=9)
    resize = graph.node.add(name="ResizeBilinear/size", op="Const")
    resize.attr["value"].tensor.dtype = types_pb2.DT_INT32
    resize.attr["value"].tensor.int_val.extend([299, 299])
    add_constant(graph, "Sub/y", np.float32(128))
    for name, array in state_dict().items():
        axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim]
        # Both ways of writing an array are in use.
        add_constant(graph, node_name(name), array.transpose(axes), array.size > 400)
        norm = graph.node.add(name=f"{name}/use", op="BatchNormWithGlobalNormalization")
        norm.attr["variance_epsilon"].f = 0.001
        norm.attr["scale_after_normalization"].b = True
    return graph.SerializeToString()


def assert_same(actual: dict, expected: dict) -> None:
    actual, expected = dict(trees.flatten(actual)), dict(trees.flatten(expected))
    assert set(actual) == set(expected)
    for path, array in expected.items():
        np.testing.assert_array_equal(actual[path], array, path)


def test_a_graph_gives_the_parameters_of_the_same_numbers_in_pytorch():
    assert_same(convert.from_graph(graph_def.constants(graph_bytes())), params())


def test_a_graph_without_a_constant_is_refused_by_its_node():
    constants = dict(graph_def.constants(graph_bytes()))
    del constants["mixed_6/tower_1/conv_3/conv2d_params"]
    with pytest.raises(ValueError, match="'mixed_6/tower_1/conv_3/conv2d_params'"):
        convert.from_graph(constants)


def test_a_last_number_stands_for_those_left_out():
    graph = graph_pb2.GraphDef()
    node = add_constant(graph, "x", np.zeros((2, 3)), content=False)
    del node.attr["value"].tensor.float_val[:]
    node.attr["value"].tensor.float_val.extend([1.0, 2.0])
    (array,) = graph_def.constants(graph.SerializeToString()).values()
    assert array.tolist() == [[1, 2, 2], [2, 2, 2]]


def test_numbers_in_fields_of_their_own_are_read():
    def message(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    floats = b"".join(b"\x2d" + np.float32(value).tobytes() for value in (1.5, -2))
    tensor = b"\x08\x01" + message(2, message(2, b"\x08\x02")) + floats
    entry = message(1, b"value") + message(2, message(8, tensor))
    node = message(1, b"x") + message(2, b"Const") + message(5, entry)
    assert graph_def.constants(message(1, node))["x"].tolist() == [1.5, -2]


def test_a_constant_of_too_few_bytes_is_refused_by_name():
    graph = graph_pb2.GraphDef()
    node = add_constant(graph, "conv/x", np.zeros((2, 3)))
    node.attr["value"].tensor.tensor_content = b"\0" * 20
    with pytest.raises(ValueError, match=r"'conv/x' holds 5 numbers for the shape \(2, 3\)"):
        graph_def.constants(graph.SerializeToString())


@pytest.mark.parametrize(
    "data",
    [b"PK\x03\x04" * 9, b"\x0a\xff\xff", b"\x0a\x02\x08", b"\x0a" + b"\xff" * 11, b"\x08"],
    ids=["zip", "length", "number", "ten bytes", "end"],
)
def test_bytes_of_no_graph_are_refused(data):
    with pytest.raises(ValueError, match="not a serialised graph"):
        graph_def.constants(data)


# Files and commands.


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with the weights as PyTorch's file and as a graph."""
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("inception")
    arrays = {name: torch.from_numpy(array) for name, array in state_dict().items()}
    torch.save(arrays, folder / "weights.pth")
    (folder / "graph.pb").write_bytes(graph_bytes())
    return folder


def command(*args) -> None:
    convert_checkpoint.main([str(arg) for arg in args])


def refusal(*args) -> str:
    """The one line that a command ends in, with exit status 1."""
    with pytest.raises(SystemExit) as caught:
        command(*args)
    (line,) = str(caught.value.code).splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.torch
@pytest.mark.parametrize("file", ["weights.pth", "graph.pb"])
def test_a_file_becomes_a_folder_that_loads(files, tmp_path, capsys, file):
    command("to-jax", "--input", files / file, "--output", tmp_path / "folder")
    assert "inception.safetensors: the Inception-v3 of FID" in capsys.readouterr().out
    module, loaded = inception.load_network(tmp_path / "folder")
    assert isinstance(module, InceptionV3)
    assert_same(loaded, params())


@pytest.mark.torch
def test_a_folder_goes_back_to_the_same_state_dict(files, tmp_path):
    command("to-jax", "--input", files / "weights.pth", "--output", tmp_path / "folder")
    command("to-torch", "--input", tmp_path / "folder", "--output", tmp_path / "back.safetensors")
    back = weight_files.read_weights(tmp_path / "back.safetensors")
    assert set(back) == set(shapes())
    for name, array in state_dict().items():
        np.testing.assert_array_equal(back[name], array, name)
    assert_same(inception.read_parameters(tmp_path / "back.safetensors"), params())


@pytest.mark.torch
@pytest.mark.parametrize("file", ["weights.pth", "graph.pb"])
def test_inspect_says_that_it_is_an_inception(files, capsys, file):
    command("inspect", "--input", files / file)
    out = capsys.readouterr().out
    assert "Inception-v3 of 2015" in out
    assert "parameters    23,885,392 in 472 arrays" in out
    assert "32 × 3 × 3 × 3" in out or "3 × 3 × 3 × 32" in out


@pytest.mark.parametrize("source", ["missing", "missing.pth", "missing.pb", "."])
def test_missing_weights_say_where_to_get_them(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError) as caught:
        inception.load_network(source)
    for said in (inception.URL, "mdt convert to-jax --input"):
        assert said in str(caught.value)


def test_several_files_are_not_chosen_between(tmp_path):
    for name in ("a.pth", "b.pb"):
        (tmp_path / name).touch()
    with pytest.raises(WeightsError, match="several files of weights, a.pth, b.pb; give one"):
        inception.load_network(tmp_path)


@pytest.mark.torch
def test_truncated_files_are_refused_by_name(files, tmp_path):
    for file in ("weights.pth", "graph.pb"):
        whole = (files / file).read_bytes()
        for size in (0, 1000, len(whole) // 2):
            (tmp_path / file).write_bytes(whole[:size])
            with pytest.raises(WeightsError, match=file):
                inception.load_network(tmp_path / file)


def test_another_graph_is_refused(tmp_path):
    graph = graph_pb2.GraphDef()
    add_constant(graph, "dense/kernel", np.zeros((2, 3)))
    (tmp_path / "other.pb").write_bytes(graph.SerializeToString())
    with pytest.raises(WeightsError, match=r"other.pb is not classify_.*\(dense/kernel\)"):
        inception.load_network(tmp_path / "other.pb")


def test_an_archive_is_not_taken_for_weights(tmp_path):
    (tmp_path / "inception-2015-12-05.tgz").touch()
    with pytest.raises(WeightsError, match="classify_image_graph_def.pb, unpacked"):
        inception.load_network(tmp_path / "inception-2015-12-05.tgz")


def test_torchvisions_weights_are_refused_by_the_commands(tmp_path):
    file = tmp_path / "inception_v3.safetensors"
    names = ("Mixed_5b.branch1x1.conv.weight", "fc.weight")
    weight_files.write_weights(file, {name: np.zeros((1000, 1), np.float32) for name in names})
    for args in (("to-jax", "--output", tmp_path / "out"), ("inspect",)):
        assert "torchvision's inception_v3" in refusal(*args, "--input", file)


def test_a_folder_that_holds_something_is_not_written_to(tmp_path):
    file = tmp_path / "inception.safetensors"
    flat = {path: leaf for path, leaf in trees.flatten(convert.from_torch(zeros()))}
    weight_files.write_weights(file, flat)
    assert "is there already" in refusal("to-jax", "--input", file, "--output", tmp_path)


@pytest.mark.parametrize("name", ["Mixed_5b.branch1x1.conv.weight", "mixed/conv/conv2d_params"])
def test_a_transformer_is_not_looked_for_in_inception_weights(name):
    with pytest.raises(UnknownWeights, match="give it as --inception"):
        identify({name: (64, 192, 1, 1)})
