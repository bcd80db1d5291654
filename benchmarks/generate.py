"""Generation with the key-value cache beside recomputing everything for each token, in one run.

    $ python benchmarks/generate.py
    124M parameters, float32 on a CPU, 256 tokens after 64
      everything recomputed       ... tokens/s
      generate()                  ... tokens/s   ... x, the same tokens

Both are greedy. The recomputing loop runs the model over all tokens so far, the output head at the
last one.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, from anywhere


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)

    import torch

    from model import GPT, GPTConfig
    from pretrain import distributed

    device = distributed.pick_device(args.device)
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=args.n_layer)).to(device).eval()
    prompt = torch.randint(model.config.vocab_size, (1, args.prompt_tokens), device=device)

    @torch.no_grad()
    def recompute(tokens, count):
        for _ in range(count):
            hidden = model.hidden_states(tokens[:, -model.config.block_size :])
            tokens = torch.cat(
                (tokens, model.logits(hidden[:, -1]).argmax(-1, keepdim=True)), dim=1
            )
        return tokens

    def timed(function, count):
        function(prompt, 4)  # warm-up
        distributed.synchronize(device)
        t0 = time.perf_counter()
        tokens = function(prompt, count)
        distributed.synchronize(device)
        return tokens, count / (time.perf_counter() - t0)

    cached, fast = timed(lambda x, n: model.generate(x, n, temperature=0), args.new_tokens)
    plain, slow = timed(recompute, args.new_tokens)
    same = torch.equal(cached, plain)
    print(
        f"{model.num_parameters() / 1e6:.0f}M parameters, float32 on"
        f" {distributed.device_name(device)},"
        f" {args.new_tokens} tokens after a prompt of {args.prompt_tokens}"
    )
    print(f"  everything recomputed  {slow:8.1f} tokens/s")
    print(f"  generate()             {fast:8.1f} tokens/s   {fast / slow:.1f} x, ", end="")
    print("the same tokens" if same else "OTHER TOKENS")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
