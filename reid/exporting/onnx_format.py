"""The ONNX format: a network's graph, with the resizing of images before it where asked for."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from reid.checkpoint import Trained
from reid.errors import missing_package
from reid.exporting.network import (
    INPUT,
    ONNX_PACKAGES,
    OUTPUT,
    Preprocessing,
    example,
    feature_extractor,
    normalisation,
    quiet,
    transform_of,
)

try:
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401  (torch's exporter needs it)
    from onnx import compose, helper
except ImportError as error:
    raise missing_package("--format onnx (unlike --format torch)", *ONNX_PACKAGES) from error

from reid.exporting.int8 import as_convolutions, quantised

OPSET = 18  # the first whose Resize knows antialiasing; ONNX Runtime 1.14 and newer read it


def onnx_file(trained: Trained, facts: dict, calibration: Sequence[np.ndarray] = ()) -> bytes:
    """Return the bytes of an ONNX file.

    trained: `reid.checkpoint.Trained`, whose network is changed; facts: its `metadata`.
    calibration: for int8, resized training images, uint8 [H, W, 3].
    """
    if facts["precision"] == "int8":  # the network alone: its preprocessing stays in fp32
        outside = facts | {"preprocess": "outside"}
        extractor = feature_extractor(trained, outside)
        if trained.net.classic:
            extractor = as_convolutions(extractor)
        model = onnx_model(extractor, outside)
        model = quantised(model, calibration, facts)
        if facts["preprocess"] == "inside":
            first = Preprocessing(transform_of(facts), normalisation(facts))
            model = joined(onnx_model(first, facts), model)
    else:
        model = onnx_model(feature_extractor(trained, facts), facts)
    helper.set_model_props(model, facts)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def onnx_model(module: nn.Module, facts: dict) -> onnx.ModelProto:
    """Return the ModelProto of a torch module that takes the images of `metadata`."""
    images, varying = example(facts)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
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


def joined(first, second):
    """Join two ModelProtos into one that feeds the output of the first to the second."""
    first.ir_version = second.ir_version
    first = compose.add_prefix(first, "preprocessing_", rename_inputs=False)
    model = compose.merge_models(first, second, io_map=[(f"preprocessing_{OUTPUT}", INPUT)])
    opsets = {opset.domain: opset.version for opset in model.opset_import}  # each was there twice
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(*opset) for opset in opsets.items())
    return model


def onnx_compute(
    path: str | Path, threads: int | None = None
) -> tuple[Callable[[np.ndarray], np.ndarray], dict]:
    """Load an ONNX file on the CPU: returns its network as a function of arrays, and its facts.

    threads: None takes all cores.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = threads or os.cpu_count()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def compute(images):
        return session.run([OUTPUT], {INPUT: images})[0]

    return compute, session.get_modelmeta().custom_metadata_map
