"""Loads gpt-oss checkpoints with integer experts, named as vLLM names them, into transformers: renames and decodes, no more.

Written for transformers 5.20 to 5.23 with compressed-tensors 0.17 to 0.20. config.json's auto_map names one of the classes, so
that `from_pretrained(..., trust_remote_code=True)` runs this file. Experts take the dtype of the load; attention is left to
compressed-tensors.

    GptOssPackedForCausalLM  experts.N.{w13,w2}_weight_packed int32 [out, in·b/32], *_weight_scale [out, in/32]; b is 4 or 8
    GptOssInt8ForCausalLM    experts.{gate_up_proj,down_proj} int8 [E, in, out], *.weight_scale [E, 1, out]
"""

import torch
from transformers import GptOssForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter


class Decode(ConversionOps):
    """Codes times scales in float32, one expert at a time, into the parameter [E, in, out]."""

    def __init__(self, matrix):
        self.matrix = matrix

    def convert(self, input_dict, source_patterns, target_patterns, model=None, full_layer_name=None, **kwargs):
        scales = next(_each(found) for name, found in input_dict.items() if "weight_scale" in name)
        codes = next(_each(found) for name, found in input_dict.items() if "weight_scale" not in name)
        parameter = model.get_parameter(full_layer_name)
        out = torch.empty(parameter.shape, dtype=parameter.dtype)
        for expert, (code, scale) in enumerate(zip(codes, scales, strict=True)):
            out[expert] = self.matrix(code, scale.float())
        return {full_layer_name: out}

    @property
    def reverse_op(self):
        raise NotImplementedError("integers are not made again on saving: keep the files that were loaded")


def _each(found):
    """One tensor an expert: a list of them, or a single one of all."""
    return found[0] if len(found) == 1 and found[0].dim() == 3 else found


def packed(words, scale):
    """int32 [out, in·b/32], scales [out, in/32] → [in, out]. A code lies 2^(b−1) above its integer, the first in the low bits."""
    rows, groups = scale.shape
    codes = words.contiguous().view(torch.uint8)
    if words.shape[1] == 4 * groups:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).float() - 8
    else:
        codes = codes.float() - 128
    return (codes.view(rows, groups, 32) * scale[..., None]).view(rows, -1).T


def channels(codes, scale):
    """int8 [in, out], scales [1, out] → [in, out]."""
    return codes.float() * scale


class GptOssPackedForCausalLM(GptOssForCausalLM):
    """gpt-oss whose experts lie as packed integers with a scale for each group of 32."""


class GptOssInt8ForCausalLM(GptOssForCausalLM):
    """gpt-oss whose experts lie as int8 with a scale for each output."""


_PROJECTIONS = (("w13", "gate_up_proj"), ("w2", "down_proj"))
register_checkpoint_conversion_mapping(
    "GptOssPackedForCausalLM",
    [
        WeightConverter(
            [f"mlp.experts.*.{theirs}_weight_packed", f"mlp.experts.*.{theirs}_weight_scale"],
            [f"mlp.experts.{ours}"],
            [Decode(packed)],
        )
        for theirs, ours in _PROJECTIONS
    ],
    overwrite=True,
)
register_checkpoint_conversion_mapping(
    "GptOssInt8ForCausalLM",
    [
        WeightConverter(
            [f"mlp.experts.{name}$", f"mlp.experts.{name}.weight_scale$"], [f"mlp.experts.{name}"], [Decode(channels)]
        )
        for _, name in _PROJECTIONS
    ],
    overwrite=True,
)
