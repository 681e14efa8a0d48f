"""The ONNX format: a network's graph, with the resizing of images before it where asked for."""

import os

import numpy as np
import torch

from reid.errors import UserError
from reid.exporting import INPUT, OUTPUT, example, feature_extractor, input_size, quiet
from reid.transforms import IMAGENET_MEAN, IMAGENET_STD

try:
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401  (torch's exporter needs it)
    from onnx import TensorProto, helper, numpy_helper
except ImportError as error:
    raise UserError(
        "--format onnx needs packages: pip install onnx onnxruntime onnxscript; "
        "or take --format torch"
    ) from error

from reid.quantisation import as_convolutions, quantised

OPSET = 18  # the first whose Resize knows antialiasing; ONNX Runtime 1.14 and newer read it
# Pillow's bicubic: Keys' kernel with a = -0.5, widened to shrink, weights at borders summing to 1.
PILLOW = {
    "mode": "cubic",
    "cubic_coeff_a": -0.5,
    "antialias": 1,
    "exclude_outside": 1,
    "coordinate_transformation_mode": "half_pixel",
    "axes": [1, 2],
}


def onnx_file(trained, facts, calibration=()):
    """The bytes of an ONNX file. trained: `reid.checkpoint.Trained`, whose network is changed;
    facts: its `metadata`, which says how.

    calibration: for int8, resized training images, uint8 [H, W, 3].
    """
    outside = facts | {"preprocess": "outside"}
    extractor = feature_extractor(trained, outside)
    if facts["precision"] == "int8":
        model = quantised(onnx_model(as_convolutions(extractor), outside), calibration)
    else:
        model = onnx_model(extractor, outside)
    if facts["preprocess"] == "inside":
        add_preprocessing(model, *input_size(facts))
    helper.set_model_props(model, facts)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def onnx_model(extractor, facts):
    """The ModelProto of a FeatureExtractor of images that are resized and normalised."""
    images, varying = example(facts)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            extractor,
            (images,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=(varying,),
            verbose=False,
        )
    model = program.model_proto
    for part in model.graph.node:  # where in our code each is from: as long as the graph itself
        del part.metadata_props[:]
        part.doc_string = ""
    return model


def add_preprocessing(model, height, width):
    """Have a model take uint8 [N, h, w, 3] of any size, in place.

    Pillow resizes the width first, or the height where that is less to do and images get lower,
    and rounds in between; so does this, within 1/255.
    """
    graph = model.graph
    inner = "normalised"
    for part in graph.node:
        part.input[:] = [inner if name == INPUT else name for name in part.input]
    std = np.array(IMAGENET_STD, np.float32)
    constants = {
        "to_height": np.array([height], np.int64),
        "to_width": np.array([width], np.int64),
        "to_size": np.array([height, width], np.int64),
        "per_std": 1 / (255 * std),
        "mean_by_std": np.array(IMAGENET_MEAN, np.float32) / std,
    }
    graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in constants.items())
    steps = [
        node("Shape", INPUT, "from_height", start=1, end=2),
        node("Shape", INPUT, "from_width", start=2, end=3),
        node("Mul", "from_height to_width", "width_cost"),
        node("Mul", "to_height from_width", "height_cost"),
        node("Greater", "width_cost height_cost", "dearer"),
        node("Greater", "from_height to_height", "lower"),
        node("And", "dearer lower", "height_first"),
        node("Where", "height_first to_height from_height", "half_height"),
        node("Where", "height_first from_width to_width", "half_width"),
        node("Concat", "half_height half_width", "half_size", axis=0),
        resize(INPUT, "half_size", "half_resized"),
        resize("half_resized", "to_size", "resized"),
        node("Cast", "resized", "pixels", to=TensorProto.FLOAT),
        node("Mul", "pixels per_std", "scaled"),
        node("Sub", "scaled mean_by_std", "centred"),
        node("Transpose", "centred", inner, perm=[0, 3, 1, 2]),
    ]
    network = list(graph.node)
    del graph.node[:]
    graph.node.extend(steps + network)
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    sizes = [batch, "height", "width", 3]
    graph.input[0].CopyFrom(helper.make_tensor_value_info(INPUT, TensorProto.UINT8, sizes))


def node(kind, inputs, output, **attributes):
    """A node of a graph; inputs: their names, with blanks between."""
    return helper.make_node(kind, inputs.split(), [output], **attributes)


def resize(image, size, output):
    return helper.make_node("Resize", [image, "", "", size], [output], **PILLOW)


def onnx_compute(path, threads=None):
    """An ONNX file's network on the CPU, NumPy to NumPy, and the facts in it.

    threads: None takes all cores.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = threads or os.cpu_count()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def compute(images):
        return session.run([OUTPUT], {INPUT: images})[0]

    return compute, session.get_modelmeta().custom_metadata_map
