"""Checks the reference itself: its gradients, the conditioning of the fixtures, its logits.

    /usr/bin/python3 dev/reference/check_model.py

1. Every parameter's gradient, in every architecture and scheme of the fixtures, against central
   differences in float64 along a random direction, in which GPAS's stop() stays constant.
2. The largest difference between float32 and float64, a lower bound on a float program's error.
3. Logits against Hugging Face's transformers if installed (4.47 works with PyTorch 1.13).
"""

import sys

import numpy as np
import torch
from compare import relative
from make_fixtures import (CONFIGS, L, all_parameters, parameters_of, random_of, schemes_of, tokens)
from model import Model, Scheme, forward_backward, loss_of


def worst_finite_difference(config, scheme, parameters, inputs, targets, step=1e-5):
    """The largest |difference − gradient·direction| / (|gradient| + 1e-3) over the parameters."""
    model = Model(config, scheme).double().load(parameters)
    inputs, targets = (torch.tensor(x, dtype=torch.long) for x in (inputs, targets))
    stopped = []
    model.stop = lambda x: stopped.append(x.detach().clone()) or stopped[-1]
    loss_of(model(inputs), targets).backward()

    def loss_at(parameter, values):
        constants = iter(stopped)
        model.stop = lambda x: next(constants)
        with torch.no_grad():
            parameter.copy_(values)
            return loss_of(model(inputs), targets).item()

    worst = 0.0
    for name, parameter in model.named_parameters():
        start = parameter.detach().clone()
        direction = random_of(config, "direction of " + name).standard_normal(start.shape)
        direction = torch.tensor(direction / np.linalg.norm(direction))
        difference = loss_at(parameter, start + step * direction)
        difference -= loss_at(parameter, start - step * direction)
        loss_at(parameter, start)
        slope = (parameter.grad * direction).sum().item()
        error = abs(difference / (2 * step) - slope) / (parameter.grad.norm().item() + 1e-3)
        worst = max(worst, error)
    return worst


def float_error(config, scheme, parameters, inputs, targets):
    """(error, name) of the tensor with the largest float32 error; scalars count as one vector."""
    runs = [forward_backward(config, scheme, parameters, inputs, targets, dtype)
            for dtype in (torch.float32, torch.float64)]
    scalars = [n for n in runs[0] if runs[0][n].size == 1 and n != "loss"]
    for run in runs:
        if scalars:
            run["scalars"] = np.concatenate([run.pop(n) for n in scalars])
    return max((relative(runs[0][n].ravel(), runs[1][n].ravel()), n) for n in runs[1])


def hugging_face_logits(config, parameters, inputs):
    """The logits of transformers' model with these parameters, in float64."""
    import transformers as hf

    if config.is_gpt2:
        theirs = hf.GPT2LMHeadModel(hf.GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.max_position_embeddings,
            n_embd=config.hidden_size, n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads, n_inner=config.intermediate_size,
            layer_norm_epsilon=config.norm_eps))
    else:
        family = {"qwen2": "Qwen2", "qwen3": "Qwen3", "olmo": "Olmo", "olmo2": "Olmo2",
                  "mistral": "Mistral", "smollm3": "SmolLM3"}.get(config.architecture, "Llama")
        settings = {key: getattr(config, key) for key in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "intermediate_size", "max_position_embeddings", "rope_theta",
            "tie_word_embeddings")}
        if family != "Olmo":
            settings["rms_norm_eps"] = config.norm_eps
        if config.head_dim:
            settings["head_dim"] = config.head_dim
        if config.rope_scaling:
            settings["rope_parameters"] = dict(
                config.rope_scaling, rope_theta=settings.pop("rope_theta"))
        if config.sliding_window or family == "Mistral":
            settings["sliding_window"] = config.sliding_window or None
        if family == "SmolLM3":
            settings["use_sliding_window"] = bool(config.sliding_window)
            settings["layer_types"] = ["sliding_attention" if window else "full_attention"
                                       for window in config.window_layers]
            settings["no_rope_layers"] = [int(rotated) for rotated in config.rotated_layers]
        for bias in ("attention_bias", "mlp_bias"):
            if getattr(config, bias):
                settings[bias] = True
        settings.update(pad_token_id=None, bos_token_id=None, eos_token_id=None)
        theirs = getattr(hf, family + "ForCausalLM")(
            getattr(hf, family + "Config")(attn_implementation="eager", **settings))
    theirs = theirs.double().eval()
    state = {name: torch.tensor(values).double() for name, values in parameters.items()}
    missing, unknown = theirs.load_state_dict(state, strict=False)
    missing = [n for n in missing if n != "lm_head.weight" or not config.tie_word_embeddings]
    if missing or unknown:
        raise ValueError(f"transformers: missing parameters {missing}, unknown parameters {unknown}")
    theirs.tie_weights()
    with torch.no_grad():
        return theirs(torch.tensor(inputs, dtype=torch.long)).logits.numpy()


def main():
    torch.set_num_threads(1)
    try:
        import transformers
    except ImportError:
        transformers = None
        print("transformers is not installed, so logits are not compared")
    failed = False

    def report(what, error, limit):
        nonlocal failed
        failed |= not error <= limit
        print(f"  {what}: {error:.1e}{'' if error <= limit else f'  <-- FAIL, limit {limit:g}'}")

    for config in CONFIGS:
        print(config.architecture)
        inputs, targets = tokens(config)
        stored = all_parameters(config)
        differences, floats = [], []
        for text in schemes_of(config):
            scheme = Scheme.parse(text, L)
            case = (config, scheme, parameters_of(config, scheme, stored), inputs, targets)
            differences.append((worst_finite_difference(*case), text))
            floats.append((*float_error(*case), text))
        error, text = max(differences)
        report(f"finite differences, worst of {len(differences)} schemes ({text})", error, 1e-6)
        error, name, text = max(floats)
        report(f"float32 against float64, worst ({text}, {name})", error, 5e-6)
        if transformers and config.norm_type == "stock":
            scheme = Scheme.parse("olmo2" if config.architecture == "olmo2" else "pre", L)
            parameters = parameters_of(config, scheme, stored)
            ours = forward_backward(config, scheme, parameters, inputs, targets)["logits"]
            theirs = hugging_face_logits(config, parameters, inputs)
            report("logits against transformers " + transformers.__version__,
                   relative(ours.ravel(), theirs.ravel()), 1e-6)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
