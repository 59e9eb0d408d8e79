"""The text of a small plan file: ViT-L on 64 chips, 16-way data, 4-way tensor."""

PLAN = """\
name: small
model: vit-l
machine: v4:4x4x4
batch: 1024
mesh:
  data: {size: 16, torus: {x: 4, z: 4}}
  model: {size: 4, torus: {y: 4}}
rules:
  parameters: {embed: [data], heads: [model], mlp: [model]}
  activations: {batch: [data], embed: [model], heads: [model], mlp: [model]}
remat: full
"""
