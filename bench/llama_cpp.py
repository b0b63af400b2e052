"""llama.cpp for ``bench_decode.py``, on one thread, with SmolLM2's weights in fp16.

It comes with ``pip install --no-deps llama-cpp-cffi==0.3.1`` and ``pip install cffi``. Its compiled module is loaded
without the package around it, which asks for older libraries than ours.
"""

import importlib.util
from pathlib import Path

import numpy as np

F16_FILE_TYPE = 1


def compiled_module():
    """llama.cpp's compiled module; None where it is not installed."""
    spec = importlib.util.find_spec("llama")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((path for folder in folders for path in Path(folder).glob("_llama_cpp_cpu.*")), None)


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
        spec = importlib.util.spec_from_file_location("llama._llama_cpp_cpu", compiled_module())
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
