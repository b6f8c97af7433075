"""Every family at a tiny size: the same numbers as transformers, in torch and in ONNX, whole and compressed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import compressor
from compressor.bank import Bank
from compressor.errors import ModelError
from compressor.executor import Executor, Reference
from compressor.export import OnnxDecoder, export_onnx, exported_bytes, fixed_bytes
from compressor.folder import save_folder
from compressor.model import Teacher, load_teacher, read_decoder, save_teacher
from compressor.network import loaded
from compressor.plan import DROP, Action, Plan
from compressor.recovery.distill import Imitation, Settings, distill
from compressor.recovery.reconstruct import reconstruct
from compressor.student import full_plan
from tests.conftest import check_golden

LLAMA = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2 = {
    "vocab_size": 256,
    "n_embd": 64,
    "n_inner": 96,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
}
NEOX = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
GEMMA = LLAMA | {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 24}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
CONFIGS = {
    "llama": ("LlamaConfig", LLAMA | {"tie_word_embeddings": True}),
    "llama-biased": ("LlamaConfig", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-far": (
        "LlamaConfig",
        LLAMA
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("MistralConfig", LLAMA | {"sliding_window": 20, "head_dim": 16}),
    "qwen2": ("Qwen2Config", LLAMA | {"tie_word_embeddings": True}),
    "qwen2-half-local": (
        "Qwen2Config",
        LLAMA | {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", LLAMA | {"head_dim": 32, "tie_word_embeddings": True}),
    "mixtral": (
        "MixtralConfig",
        LLAMA | {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 20},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        LLAMA | MIXTURE | {"shared_expert_intermediate_size": 80, "mlp_only_layers": [2], "tie_word_embeddings": True},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        LLAMA | MIXTURE | {"head_dim": 32, "norm_topk_prob": True, "decoder_sparse_step": 2, "attention_bias": True},
    ),
    "phi3": ("Phi3Config", LLAMA),
    "phi3-partly-rotated": (
        "Phi3Config",
        LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "gemma2": ("Gemma2Config", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2-biased": ("Gemma2Config", GEMMA | {"attention_bias": True}),
    "gemma3": (
        "Gemma3TextConfig",
        GEMMA | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gpt2": ("GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoXConfig", NEOX | {"rotary_pct": 0.5}),
    "gpt_neox-serial": ("GPTNeoXConfig", NEOX | {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "phi": ("PhiConfig", LLAMA | {"partial_rotary_factor": 0.5}),
}
families = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(scope="session")
def folders(tiny_folder, tmp_path_factory) -> dict[str, Path]:
    """A model folder of every configuration."""
    made = {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    for name, (config, changes) in CONFIGS.items():
        made[name] = tmp_path_factory.mktemp(name)
        write_model(transformers.AutoModelForCausalLM, getattr(transformers, config)(**changes), made[name])
        tokenizer.save_pretrained(made[name])
    return made


def write_model(kind, config, folder: Path) -> None:
    """Random weights; no gain is 1 and no bias 0, so that none can be forgotten."""
    torch.manual_seed(0)
    model = kind.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)


def mixed_plan(decoder) -> Plan:
    """Every kind of action in three blocks."""
    kept = max(1, decoder.kv_heads // 2)
    actions = {
        "embedding": Action(1, "w8"),
        "layers.0.attention": Action(kept, "w4+w8"),
        "layers.0.ffn": Action(64, "int8"),
        "layers.1.attention": DROP,
        "layers.1.ffn": Action(decoder.channels, "w2+w4b64"),
        "layers.2.attention": Action(decoder.kv_heads, "int8"),
        "layers.2.ffn": DROP,
        "head": Action(1, "w4"),
    }
    return spread(decoder, actions, [DROP, Action(32, "int8"), Action(48, "w4"), Action(64, "w2"), Action(40, "int8")])


def spread(decoder, actions: dict[str, Action], experts: list[Action]) -> Plan:
    """These actions of sub-layers and tables; where a mixture is not dropped, its experts have one of `experts` each."""
    actions = dict(actions)
    for name, sites in decoder.sub_layers().items():
        if len(sites) > 1:
            given = [DROP] * len(sites) if actions[name] == DROP else experts
            actions |= {site.name: action for site, action in zip(sites, given, strict=False)}
    return Plan(tuple((site.name, actions[site.name]) for site in decoder.sites()))


def half_plan(decoder) -> Plan:
    """The same in formats that float16 graphs take, too."""
    names = {"int8": "w8", "w2": "w4", "w2+w4b64": "w4+w4b64"}
    return Plan(tuple((key, Action(a.keep, names.get(a.format, a.format))) for key, a in mixed_plan(decoder).items()))


def theirs(folder: Path, ids_BL: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(ids_BL).logits


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def by_genai(folder: Path, prompt: list[int], new_tokens: int) -> list[int] | None:
    """Greedy tokens of ONNX Runtime GenAI behind a prompt; None where it is not installed."""
    try:
        import onnxruntime_genai as genai
    except ImportError:
        return None
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + new_tokens)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return list(map(int, generator.get_sequence(0)[len(prompt) :]))


@families
def test_torch_and_onnx_compute_what_transformers_does(folders, name, windows, tmp_path):
    """Longer than every window; token by token with a cache, too."""
    ids_BL = windows[:2, :48]
    wanted = theirs(folders[name], ids_BL).numpy()
    teacher = load_teacher(folders[name])
    assert read_decoder(folders[name]) == teacher.network.decoder
    with torch.no_grad():
        assert error(teacher.network.model(ids_BL).numpy(), wanted) < 1e-5
    assert (
        error(
            teacher.network.cached_step(ids_BL[:, :31])()[:, -1].numpy(),
            theirs(folders[name], torch.cat([ids_BL[:, :31], ids_BL[:, 30:31]], 1))[:, -1].numpy(),
        )
        < 1e-5
    )
    plan = full_plan(teacher.network.decoder, "fp32", "fp32")
    bank = Bank(tmp_path / "bank", teacher.network, windows[:4], windows[:2])
    save_folder(bank.realize(plan), teacher, tmp_path / "onnx")
    with OnnxDecoder(tmp_path / "onnx", threads=1) as decoder:
        assert error(decoder.logits(ids_BL[0].numpy()), wanted[0]) < 1e-5
        prompt = ids_BL[0, :20]
        assert decoder.generate(prompt.numpy(), 24) == teacher.network.greedy(prompt, 24)
    limit = fixed_bytes(teacher.network.decoder) + sum(
        s.size_bytes(plan[s.name]) for s in teacher.network.decoder.sites()
    )
    assert exported_bytes(tmp_path / "onnx") <= limit


@families
def test_a_compressed_student_is_scored_recovered_exported_and_loaded(folders, name, windows, tmp_path):
    teacher = load_teacher(folders[name])
    network, plan = teacher.network, mixed_plan(teacher.network.decoder)
    bank = Bank(tmp_path / "bank", network, windows[:8], windows[:2])
    before = Executor(bank, windows[8:16]).score(plan).kl
    rebuilt = reconstruct(bank, plan, windows[:8])
    text = windows[16:20]
    settings = Settings(steps=2, warmup=0, check_every=1)
    student, curve = distill(
        network, rebuilt, lambda copy: Imitation(network, copy, text), windows[20:], settings, tmp_path / "part"
    )
    assert 0 < before < 20 and len(curve.training) == 2

    save_folder(student, teacher, tmp_path / "onnx")
    ids_L = windows[20, :40]
    exact = loaded(network, student, "none")
    with torch.no_grad():
        wanted = exact.model(ids_L[None])[0].numpy()
    with OnnxDecoder(tmp_path / "onnx", threads=1, exact=True) as decoder:
        assert error(decoder.logits(ids_L.numpy()), wanted) < 1e-4
        assert decoder.generate(ids_L[:12].numpy(), 12) == exact.greedy(ids_L[:12], 12)
    with OnnxDecoder(tmp_path / "onnx", threads=1) as decoder:
        deployed = decoder.logits(ids_L.numpy())
        made = decoder.generate(ids_L[:12].numpy(), 12)
    assert by_genai(tmp_path / "onnx", ids_L[:12].tolist(), 12) in (made, None)
    again = compressor.load(tmp_path / "onnx")
    with torch.no_grad():
        assert error(again(ids_L[None])[0].numpy(), deployed) < 0.05
    limit = fixed_bytes(network.decoder) + sum(site.size_bytes(plan[site.name]) for site in network.decoder.sites())
    assert exported_bytes(tmp_path / "onnx") <= limit
    check_golden(f"decoder: {name}", before, tmp_path / "onnx")


@families
def test_half_precision(folders, name, windows, tmp_path):
    """float16 is what GPUs take; the CPU runs it, too."""
    network = load_teacher(folders[name]).network
    plan = half_plan(network.decoder)
    made = Bank(tmp_path / "bank", network, windows[:8], windows[:2]).realize(plan)
    half = replace(made.decoder, precision="float16")
    export_onnx(replace(made, decoder=half), tmp_path)
    ids_L = windows[20, :40]
    with torch.no_grad():
        wanted = loaded(network, made, "none").model(ids_L[None])[0].numpy()
    for exact, tolerance in ((True, 5e-3), (False, 0.05)):
        with OnnxDecoder(tmp_path, threads=1, exact=exact) as decoder:
            found = decoder.logits(ids_L.numpy())
        # of tokens, since rounding sends some to another expert: their logits are others
        assert np.median([error(*pair) for pair in zip(found, wanted, strict=True)]) < tolerance
    assert exported_bytes(tmp_path) <= fixed_bytes(half) + sum(s.size_bytes(plan[s.name]) for s in half.sites())


@families
def test_a_teacher_is_written_back_or_refused(folders, name, windows, tmp_path):
    teacher = load_teacher(folders[name])
    if name.split("-")[0] in ("llama", "mistral", "qwen2", "qwen3"):
        save_teacher(teacher, tmp_path)
        assert torch.equal(theirs(tmp_path, windows[:1]), theirs(folders[name], windows[:1]))
    else:
        with pytest.raises(ModelError, match="written otherwise"):
            save_teacher(teacher, tmp_path)


@pytest.mark.parametrize(
    ("config", "changes", "match"),
    [
        ("OPTConfig", {}, "model_type 'opt' .supported: llama, .*FAMILIES"),
        ("GPT2Config", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("PhiConfig", {"qk_layernorm": True}, "qk_layernorm"),
        ("MixtralConfig", {"num_experts_per_tok": 9}, r"num_experts_per_tok = 9 .expected: 1 to num_experts = 8."),
        ("Qwen3MoeConfig", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0 .expected: at least 1."),
        ("LlamaConfig", {"hidden_act": "tanh"}, "activation 'tanh'"),
        (
            "LlamaConfig",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'yarn' .supported: default, linear, llama3",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, changes, match, tmp_path):
    getattr(transformers, config)(**changes).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=match):
        read_decoder(tmp_path)


def test_the_teacher_of_a_family_keeps_its_own_name(folders):
    assert isinstance(load_teacher(folders["gpt2"]), Teacher)
    assert load_teacher(folders["gpt2"]).network.family == "gpt2"


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_reconstruction_sees_through_a_norm_behind_a_sub_layer(folders, name, windows, tmp_path):
    network = load_teacher(folders[name]).network
    bank, plan = Bank(tmp_path, network, windows[:16], windows[:2]), full_plan(network.decoder, "w4", "w8")
    reference = Reference(network, windows[16:])
    before, behind = (
        reference.kl(loaded(network, student))
        for student in (bank.realize(plan), reconstruct(bank, plan, windows[:16]))
    )
    assert behind < 0.9 * before
