# For `custom_keys`: no decay of the backbone's norms and a tenth of the learning rate, as Mask2Former trains backbones.
# Blocks that an arch does not have match nothing.
backbone_norm = dict(lr_mult=0.1, decay_mult=0.0)
backbone_norms = {
    'backbone.norm': backbone_norm,
    **{f'backbone.stem.{conv}.norm': backbone_norm for conv in ('conv1', 'conv2.0', 'conv2.1', 'conv3.0', 'conv3.1')},
    **{f'backbone.downsamples.{stage}.2.norm': backbone_norm for stage in range(3)},
    **{
        f'backbone.stages.{stage}.{block}.{norm}': backbone_norm
        for stage, depth in enumerate((2, 4, 21, 5))
        for block in range(depth)
        for norm in ('mixer.ln', 'mixer.out_norm', 'mlp.ln')
    },
}
