"""How a network is called: diffusers' UNet2DConditionModel, told a text and SDXL's six numbers of size and crop."""

from __future__ import annotations

from torch import Tensor

from nai_xl.interfaces import Denoiser


def predict(denoise: Denoiser, xt: Tensor, t: Tensor, context: Tensor, pooled: Tensor, time_ids: Tensor) -> Tensor:
    """The network's prediction [B,4,h,w], in its own precision.

    xt [B,4,h,w]; t [B] timesteps; context [B,77k,D] and pooled [B,P] of the text; time_ids [B,6].
    """
    condition = {"text_embeds": pooled, "time_ids": time_ids}
    return denoise(xt, t, context, added_cond_kwargs=condition, return_dict=False)[0]
