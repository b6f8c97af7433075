"""From a student to files that ONNX Runtime runs; the one package that knows ONNX.

layout.py    a weight matrix as the arrays its kernel reads; whether int8 products saturate on this processor
layers.py    what graphs are made of: nodes, matrices in every format, every sub-layer a function
graph.py     the whole model, and stacks of one site for timing
files.py     model.onnx and model.onnx_data: written, promised in bytes, read back; of an encoder-decoder encoder_model.onnx,
             decoder_model.onnx, decoder_with_past_model.onnx and the same data file for all three
genai.py     the configuration with which ONNX Runtime GenAI runs that graph
exact.py     the same graph without the rounding of activations, to compare with torch
runtime.py   sessions on the device asked for, generation, calls to be timed
"""

import json
from pathlib import Path

from compressor.export.files import (
    export_onnx,
    export_random,
    exported_bytes,
    exported_files,
    fixed_bytes,
    fp32_bytes,
    read_student,
)
from compressor.export.genai import genai_config
from compressor.export.layout import int8_products_are_exact
from compressor.export.runtime import (
    Cache,
    OnnxDecoder,
    OnnxEncoderDecoder,
    open_model,
    open_session,
    refused_formats,
    site_stack,
)
from compressor.families import genai_type
from compressor.files import write_text_atomic
from compressor.network import Network
from compressor.plan import Plan
from compressor.student import Student

GENAI_FILE = "genai_config.json"


def save_model(student: Student, network: Network, folder: Path) -> None:
    """Write a student's graph and weights into `folder`, and what ONNX Runtime GenAI reads. network: the teacher's."""
    export_onnx(student, folder)
    if student.decoder.causal and not student.decoder.encoder:
        genai = genai_config(student.decoder, student.plan, genai_type(network.family), network.special_tokens())
        write_text_atomic(folder / GENAI_FILE, json.dumps(genai, indent=1))


def save_random(plan: Plan, network: Network, folder: Path) -> None:
    """Write a model of a plan's shape with random weights, for timing. network: the teacher's."""
    export_random(network.decoder, plan, folder)


__all__ = [
    "Cache",
    "OnnxDecoder",
    "OnnxEncoderDecoder",
    "export_onnx",
    "export_random",
    "exported_bytes",
    "exported_files",
    "fixed_bytes",
    "fp32_bytes",
    "genai_config",
    "int8_products_are_exact",
    "open_model",
    "open_session",
    "read_student",
    "refused_formats",
    "save_model",
    "save_random",
    "site_stack",
]
