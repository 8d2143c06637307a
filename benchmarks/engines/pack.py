"""Gather what a GPU machine without a network needs to run vLLM on our kernels: one folder of about 60 MB.

    python -m benchmarks.engines.pack FOLDER ABIDING_WHEEL

The machine has Python 3.12, torch 2.11 for CUDA 13 and transformers. Of vLLM's wheel go its Python files and three of
its libraries, without what Hopper never loads. Nothing of the folder is committed. On the machine, in the folder:
``python -m benchmarks.engines.on_gpu``.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROGRAMS = ("on_gpu", "engine", "compare", "serve")
VLLM = "0.26.0"
LIBRARIES = ("_C_stable_libtorch", "_moe_C_stable_libtorch", "vllm_flash_attn/_vllm_fa3_C")
LEFT_OUT = ("third_party/fmha_sm100/", "third_party/deep_gemm/include/", "kernels/helion/", "/amd/", "/configs/E=")
PACKAGES = [
    *("annotated-types", "blake3", "cachetools", "cbor2", "compressed-tensors==0.17.0", "distro", "fastapi==0.135.1"),
    *("humming-kernels==0.1.10", "jiter", "loguru", "msgspec==0.22.0", "openai==2.25.0", "openai-harmony"),
    *("partial-json-parser", "pybase64", "pydantic==2.14.4", "pydantic-core==2.50.5", "pyelftools", "pyzmq", "sniffio"),
    *("starlette==1.0.1", "typing-inspection"),
    # what "vllm serve" needs beside them
    *("httptools", "jmespath", "model-hosting-container-standards", "prometheus-fastapi-instrumentator"),
    *("python-multipart", "uvicorn", "watchfiles"),
]
STUBS = ("xgrammar", "llguidance")  # guided decoding, which a comparison of kernels does not use
PLATFORMS = [f"manylinux{name}_x86_64" for name in ("_2_28", "_2_27", "_2_26", "_2_17", "_2_5", "2014", "1")]

M2: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax_m2",
    "head_dim": 128,
    "rotary_dim": 64,
    "num_key_value_heads": 8,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000000,
    "max_position_embeddings": 16384,
    "vocab_size": 32768,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDTHS = {
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_attention_heads": 48,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
}
TINY = {
    "hidden_size": 1024,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
}
PLAIN = ["lm_head", "model.embed_tokens", "*.gate"]
MODELS = {
    "tiny": (TINY, [*PLAIN, "*.self_attn*"]),
    "tiny_dense": (TINY, PLAIN),  # attention in MXFP8 too: the job "linear"
    "m2x4": (WIDTHS | {"num_hidden_layers": 4}, [*PLAIN, "*.self_attn*"]),
    "m2x12": (WIDTHS | {"num_hidden_layers": 12}, [*PLAIN, "*.self_attn*"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("wheel", type=Path, help="abiding, with its CUDA binary")
    parser.add_argument("--cache", type=Path, default=Path("build/engines/cache"), help="where wheels are kept")
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    for name in ("libraries", "wheels", "models"):
        (given.folder / name).mkdir(parents=True)
    given.cache.mkdir(parents=True, exist_ok=True)
    download(given.cache, f"vllm=={VLLM}")
    (wheel,) = given.cache.glob(f"vllm-{VLLM}-*.whl")
    pack_vllm(wheel, given.folder)
    download(given.folder / "wheels", *PACKAGES)
    shutil.copy(given.wheel, given.folder / "wheels")
    for name, (sizes, ignored) in MODELS.items():
        quantization = {"quant_method": "mxfp8", "ignored_layers": ignored}
        (given.folder / "models" / name).mkdir()
        config = M2 | sizes | {"quantization_config": quantization}
        (given.folder / "models" / name / "config.json").write_text(json.dumps(config, indent=1))
        write_tokenizer(given.folder / "models" / name)
    pack_additions(given.folder)
    pack_programs(given.folder)
    size = sum(path.stat().st_size for path in given.folder.rglob("*") if path.is_file())
    print(f"{given.folder}: {size / 1e6:.1f} MB")


def pack_programs(folder: Path) -> None:
    """The modules that run on the machine, as `benchmarks.engines`."""
    programs = folder / "benchmarks" / "engines"
    programs.mkdir(parents=True)
    for name in ("__init__", *PROGRAMS):
        shutil.copy(HERE / f"{name}.py", programs)
    shutil.copy(HERE.with_name("__init__.py"), programs.parent)


def write_tokenizer(folder: Path) -> None:
    """A word per token, so that a server has something to decode with."""
    words = {f"w{number}": number for number in range(M2["vocab_size"])}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w1", "eos_token": "w2", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def download(folder: Path, *packages: str) -> None:
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
    platforms = [f"--platform={one}" for one in PLATFORMS]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, *platforms, "-d", folder, *packages], check=True)


def pack_vllm(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as scratch:
        python = Path(scratch) / "python"
        for name in archive.namelist():
            if not name.endswith((".so", "/vllm-rs")) and not any(part in name for part in LEFT_OUT):
                archive.extract(name, python)
        with tarfile.open(folder / "vllm.tar.xz", "w:xz", preset=9) as packed:
            for path in sorted(python.iterdir()):
                packed.add(path, path.name)
        for name in LIBRARIES:
            data = bytearray(archive.read(f"vllm/{name}.abi3.so"))
            dropped = drop_other_architectures(data, 90)
            target = folder / "libraries" / f"{name.replace('/', '__')}.abi3.so.xz"
            target.write_bytes(lzma.compress(data, preset=9))
            sizes = (len(data), dropped, target.stat().st_size)
            print("{}: {:.0f} MB, {:.0f} MB dropped, {:.1f} MB packed".format(name, *(size / 1e6 for size in sizes)))


def drop_other_architectures(data: bytearray, architecture: int) -> int:
    """Overwrite with zeros all device code in a library that a GPU of ``architecture`` never loads; returns bytes.

    Each fatbin is a header and entries of SASS (kind 2) or PTX (kind 1). The driver takes the SASS of the GPU's own
    architecture, or else compiles the newest PTX that is not newer than the GPU. The file's layout stays as it is.
    """
    magic, dropped, position = struct.pack("<I", 0xBA55ED50), 0, 0
    while (position := data.find(magic, position)) != -1:
        version, header, size = struct.unpack_from("<HHQ", data, position + 4)
        end = position + header + size
        if version != 1 or header != 16 or end > len(data):
            position += len(magic)
            continue
        entries, at = [], position + header
        while at + 64 <= end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, at)
            if not 64 <= entry_header <= 4096:
                break
            entries.append((kind, struct.unpack_from("<I", data, at + 28)[0], at + entry_header, entry_size))
            at += entry_header + entry_size
        own = [one for one in entries if one[:2] == (2, architecture)]
        ptx = [one for one in entries if one[0] == 1 and one[1] <= architecture]
        kept = own or [one for one in ptx if one[1] == max(other[1] for other in ptx)]
        for entry in entries:
            if entry not in kept:
                data[entry[2] : entry[2] + entry[3]] = bytes(entry[3])
                dropped += entry[3]
        position = end
    return dropped


def pack_additions(folder: Path) -> None:
    """Packages of our own, as they lie on the path: the plugin with seeded weights, and stubs."""
    site = folder / "site"
    site.mkdir()
    shutil.copy(HERE / "random_weights.py", site)
    metadata = site / "random_weights-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: random-weights\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nrandom_weights = random_weights:register\n")
    for name in STUBS:
        (site / name).mkdir()
        (site / name / "__init__.py").write_text(
            "def __getattr__(name):\n"
            "    if name.startswith('__'):\n"
            "        raise AttributeError(name)\n"
            "    return type(name, (), {})\n"
        )
        (site / name / "testing.py").touch()


if __name__ == "__main__":
    main()
