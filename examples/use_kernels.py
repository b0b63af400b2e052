"""One kernel in someone else's model: greedy decoding with transformers, its head replaced by ``top1_head``.

transformers computes the final norm, then a logit for every token, then an argmax. ``top1_head`` does all three as it
reads the head once, writes no logits, and also gives the token's probability. Run it with

    python examples/use_kernels.py                          # a tiny random Llama
    python examples/use_kernels.py --model DIR_OR_HUB_NAME  # any Llama checkpoint

On a GPU this is the Triton kernel, on a CPU its PyTorch reference: ``torch.ops`` picks by where the tensors are.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import kangaroo_kernels.ops  # noqa: F401 (registers torch.ops.kangaroo)


def load(name: str | None, device: str) -> torch.nn.Module:
    """A checkpoint, or a random Llama small enough for any machine."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device).eval()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=1000, **sizes, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return LlamaForCausalLM(config).to(device).eval()


@torch.inference_mode()
def decode(model: torch.nn.Module, prompt: torch.Tensor, count: int) -> list[tuple[int, float]]:
    """``count`` tokens after ``prompt`` ``[1, T]``, each with its probability, by transformers' layers and our head."""
    norm, head = model.model.norm, model.lm_head.weight
    model.model.norm = torch.nn.Identity()  # top1_head takes the hidden states from before it
    try:
        tokens, cache, found = prompt, None, []
        for _ in range(count):
            step = model.model(tokens, past_key_values=cache, use_cache=True)
            cache, hidden = step.past_key_values, step.last_hidden_state[0, -1:]
            token, confidence = torch.ops.kangaroo.top1_head(hidden, norm.weight, head, norm.variance_epsilon)
            found.append((int(token), float(confidence)))
            tokens = token[None]
        return found
    finally:
        model.model.norm = norm


def main() -> None:
    """Decode both ways and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a Llama checkpoint's folder or hub name; a tiny random one if left out")
    parser.add_argument("--tokens", type=int, default=8, help="how many tokens to decode")
    settings = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(settings.model, device)
    prompt = torch.tensor([[1, 2, 3]], device=device)
    ours = decode(model, prompt, settings.tokens)
    theirs = model.generate(prompt, max_new_tokens=settings.tokens, do_sample=False)[0, prompt.shape[1] :].tolist()
    for (token, confidence), wanted in zip(ours, theirs, strict=True):
        print(f"top1_head: token {token:6d}, probability {confidence:.3f}    transformers: token {wanted:6d}")
    print("the same tokens" if [token for token, _ in ours] == theirs else "the tokens differ")


if __name__ == "__main__":
    main()
