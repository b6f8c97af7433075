"""The teacher: loaded by transformers, moved into a `transformer.Transformer`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.errors import ModelError, is_out_of_memory
from compressor.families import POOLING, blocks_beyond, check_supported, checkpoint_of, decoder_of, embeds, weights_of
from compressor.network import Network
from compressor.student import Decoder, Precision
from compressor.transformer import Transformer

BATCH_BYTES = 2**28
"""Of weights that lie in one of the files of `_on_disk`, about."""


@dataclass(frozen=True)
class Teacher:
    """The Transformer as given.

    tokenizer: as transformers made it; source: the local folder or hub id it came from; files: what else is deployed with it,
    by name.
    """

    network: Network
    tokenizer: Any
    source: str
    files: Mapping[str, bytes] = field(default_factory=dict)


def load_teacher(
    path: str | Path,
    *,
    gguf: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    precision: Precision = "float32",
    layerwise: Path | None = None,
) -> Teacher:
    """Load a causal or masked language model, a classifier or embedder of texts or an encoder-decoder in float32, and its
    tokenizer.

    Args:
        path: hub id or local folder.
        gguf: name of a GGUF file in that folder; its weights are dequantized.
        precision: of the students that are exported.
        layerwise: a folder on a disk with room for the weights in float32, which then take no memory of their own
            (`Network.layerwise`). Not with `gguf`.

    Raises:
        ModelError: nothing can be loaded from there, its weights are pickled, or the architecture is not supported.
    """
    import transformers

    options: dict = {"trust_remote_code": trust_remote_code}
    options |= {"gguf_file": gguf} if gguf else {}
    options |= {"revision": revision} if revision else {}
    transformers.utils.logging.disable_progress_bar()
    try:
        config = _configuration(path, options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        # pickled weights are not read: they may run code
        safe = {} if gguf else {"use_safetensors": True}
        kind = _transformers_class(decoder_of(config))
        # in their own type they are mapped from the checkpoint's files
        options |= {"dtype": "auto" if layerwise else torch.float32, "output_loading_info": True}
        options |= {} if gguf else {"config": config}
        model, found = kind.from_pretrained(path, **safe, **options)
    except ModelError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors each have their own tree of errors
        if is_out_of_memory(error):
            raise
        raise _cannot_load(path, gguf, error) from error
    config = model.config
    if gguf:  # the weights are plain floats now
        del config.quantization_config
    decoder = replace(decoder_of(config), precision=precision)
    # modules of an embedder are called as those of others are, but for the first name
    prefix = f"{model.base_model_prefix}." if decoder.pooling else ""
    if missing := sorted(key for key in found["missing_keys"] if not (prefix and key.startswith("pooler."))):
        raise _cannot_load(path, gguf, f"{len(missing)} weights are missing, such as {missing[0]}")
    if more := blocks_beyond(decoder, config, [f"{prefix}{key}" for key in found["unexpected_keys"]]):
        raise _cannot_load(
            path, gguf, f"there are weights of more blocks than the {decoder.layers} of config.json: {more}"
        )
    generation = getattr(model, "generation_config", None) or transformers.GenerationConfig.from_model_config(config)
    network = _empty(decoder, (config, generation))
    network.mask_token = _mask_token(path, decoder, tokenizer)
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    given = weights_of(state, config, decoder)
    weights = _on_disk(given, layerwise) if layerwise else dict(given)
    if decoder.pooling:
        weights["head.weight"] = torch.zeros(decoder.classes, decoder.hidden)
    if decoder.tied:
        weights["head.weight"] = weights["embedding.weight"]
    elif weights["head.weight"].data_ptr() == weights["embedding.weight"].data_ptr():  # tied all the same
        weights["head.weight"] = weights["head.weight"].clone()
    network.model.load_state_dict(weights, assign=True)
    if decoder.tied:
        network.model.head.weight = network.model.embedding.weight
    network.model.requires_grad_(False)
    network.layerwise = layerwise is not None
    return Teacher(network, tokenizer, str(path), _beside(path, revision) if decoder.pooling else {})


def _mask_token(path: str | Path, decoder: Decoder, tokenizer: Any) -> int | None:
    """What stands for what a model predicts, of one that is not causal.

    Raises:
        ModelError: the tokenizer has no such token, or pads with another one than the model knows.
    """
    if (decoder.classes or decoder.encoder) and tokenizer.pad_token_id != decoder.pad:
        raise ModelError(
            f"model.path = {str(path)!r}: expected one padding token, config.json has {decoder.pad}, the tokenizer "
            f"{tokenizer.pad_token_id}; correct one of the two"
        )
    if decoder.causal:
        return None
    token = tokenizer.cls_token_id if decoder.classes else tokenizer.mask_token_id
    if token is None:
        of_texts = "a [CLS] token in that of a classifier or an embedder"
        wanted = of_texts if decoder.classes else "a mask token in that of a masked language model"
        raise ModelError(f"model.path = {str(path)!r}: no such token in the tokenizer; expected {wanted}")
    return token


def _on_disk(weights: Iterable[tuple[str, Tensor]], folder: Path) -> dict[str, Tensor]:
    """The same weights, mapped from files in `folder` that have no name any more: the system reads what is used, and takes
    back its memory where that is short. They are gone from the disk when the tensors are, after a kill too."""
    for killed in folder.glob(".teacher-*"):  # in the moment in which a file still had its name
        rmtree(killed, ignore_errors=True)
    found: dict[str, Tensor] = {}
    with TemporaryDirectory(prefix=".teacher-", dir=folder) as drafts:

        def write(batch: dict[str, Tensor]) -> None:
            path = Path(drafts, f"{len(found)}.safetensors")
            save_file(batch, path)
            found.update(load_file(path))
            path.unlink()

        batch: dict[str, Tensor] = {}
        for name, weight in weights:
            batch[name] = weight
            if sum(tensor.nbytes for tensor in batch.values()) > BATCH_BYTES:
                write(batch)
                batch = {}
        write(batch)
    return found


def _transformers_class(decoder: Decoder) -> Any:
    """For such models."""
    import transformers

    if decoder.encoder:
        return transformers.AutoModelForSeq2SeqLM
    if decoder.pooling:
        return transformers.AutoModel
    if decoder.classes:
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForCausalLM if decoder.causal else transformers.AutoModelForMaskedLM


def save_teacher(teacher: Teacher, folder: Path) -> None:
    """Write a model folder as transformers does, for families whose checkpoints are written as our modules are.

    Raises:
        ModelError: the family's are not.
    """
    import transformers

    network = teacher.network
    config, generation = network.configuration
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    weights = checkpoint_of(network.model.state_dict(), config, network.decoder)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = generation
    model.save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)


def network_from_config(folder: Path) -> Network:
    """A network of the shape that `folder`/config.json says, its weights not yet set.

    Raises:
        ModelError: there is no usable configuration, or the architecture is not supported.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except Exception as error:  # see load_teacher
        raise ModelError(f"{folder} holds no usable config.json: {_first_line(error)}") from error
    check_supported(config)
    network = _empty(decoder_of(config), (config, transformers.GenerationConfig.from_model_config(config)))
    network.model.to_empty(device="cpu")
    return network


def _empty(decoder: Decoder, configuration: tuple[Any, Any]) -> Network:
    with torch.device("meta"):
        return Network(Transformer(decoder), configuration)


def read_decoder(
    path: str | Path, *, gguf: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> Decoder:
    """The shape of a model from its configuration alone; no weights are read.

    Raises:
        ModelError: there is no configuration, or the architecture is not supported.
    """
    options: dict = {"trust_remote_code": trust_remote_code}
    options |= ({"gguf_file": gguf} if gguf else {}) | ({"revision": revision} if revision else {})
    try:
        return decoder_of(_configuration(path, options))
    except ModelError:
        raise
    except Exception as error:  # see load_teacher
        raise _cannot_load(path, gguf, error) from error


SENTENCE_FILES = (
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
"""What sentence-transformers reads beside a model; the first two say what becomes of its hidden states."""


def _beside(path: str | Path, revision: str | None) -> dict[str, bytes]:
    """Those of `SENTENCE_FILES` that there are."""
    from transformers.utils import cached_file

    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = {name: cached_file(path, name, revision=revision, **missing) for name in SENTENCE_FILES}
    return {name: Path(where).read_bytes() for name, where in found.items() if where}


def _configuration(path: str | Path, options: Mapping[str, Any]) -> Any:
    """transformers' configuration; of an embedder with its `POOLING`: what sentence-transformers' files say, or the mean.

    Raises:
        ModelError: the architecture is not supported, or that pooling is not.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, **options)
    check_supported(config)
    if embeds(config) and not hasattr(config, POOLING):
        setattr(config, POOLING, _pooling(path, _beside(path, options.get("revision"))))
    return config


def _pooling(path: str | Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    if "modules.json" not in files:
        return {"pooling": "mean", "normalized": True}
    kinds = [module["type"].rpartition(".")[2] for module in json.loads(files["modules.json"])]
    said = json.loads(files.get("1_Pooling/config.json", b"{}"))
    # one mode by name as version 5 of sentence-transformers has it, or a switch for each
    switches = [key.removeprefix("pooling_mode_") for key in said if key.startswith("pooling_mode_") and said[key]]
    modes = [said["pooling_mode"]] if "pooling_mode" in said else switches
    known = {"cls": "first", "cls_token": "first", "mean": "mean", "mean_tokens": "mean"}
    expected = kinds in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
    if not expected or len(modes) != 1 or modes[0] not in known:
        raise ModelError(
            f"model.path = {str(path)!r}: expected modules Transformer, Pooling and perhaps Normalize, with the mean of all "
            f"tokens or the first one's vector; modules.json has {', '.join(kinds)}, 1_Pooling/config.json "
            f"{', '.join(map(str, modes)) or 'nothing'}"
        )
    return {"pooling": known[modes[0]], "normalized": "Normalize" in kinds}


def _cannot_load(path: str | Path, gguf: str | None, why: Exception | str) -> ModelError:
    said = why if isinstance(why, str) else f"transformers says: {_first_line(why)}"
    if not gguf and not isinstance(why, str):
        said = f"{_lacking(Path(path))}{said}"
    return ModelError(
        f"model.path = {str(path)!r}{f' with gguf = {gguf!r}' if gguf else ''} cannot be loaded; "
        f"expected a hub id or a local folder with config.json, tokenizer and weights; {said}"
    )


def _lacking(folder: Path) -> str:
    """What a folder obviously has not, and what to do about it."""
    if not folder.is_dir():
        return "there is no such folder, so it was looked for on the hub; "
    names = [path.name for path in folder.iterdir()]
    if not any(name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece")) for name in names):
        return "it has no tokenizer; copy tokenizer.json and tokenizer_config.json of the model that it was made of there; "
    if not any(name.endswith(".safetensors") for name in names) and any(name.endswith(".bin") for name in names):
        return "its weights are pickled, which may run code; write them with save_pretrained of transformers; "
    return ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
