"""What stands under the help of each command."""

COMPLETION = """\b
Completion, in a shell's start-up file:
  eval "$(_TOME_COMPLETE=bash_source tome)"       # ~/.bashrc
  eval "$(_TOME_COMPLETE=zsh_source tome)"        # ~/.zshrc
  _TOME_COMPLETE=fish_source tome | source        # ~/.config/fish/completions/tome.fish
"""
INFO = """\b
Examples:
  tome info
  TOME_BACKEND=reference tome info
  tome info vit_base_patch16_224 --r 8 --dtype float16 --device cuda
"""
BENCH = """\b
Examples:
  tome bench vit_small_patch16_224 --r 8 --r 16 --r 16,-1.0
  tome bench vit_base_patch16_224 --r 16 --batch-size 256 --dtype float16 --device cuda --compile
  tome bench vit_tiny_patch16_224 --r 0.05 --batch-size 1 --device cuda --cuda-graph --json out.json --plot out.png
"""
EVALUATE = """\b
Examples:
  tome evaluate vit_small_patch16_224 --data photos/ --r 8 --r 16 --r 16,-1.0
  tome evaluate my_models:digits_vit --data digits --mean 0.5 --std 0.5 --crop 1.0 --json out.json --plot out.png
  tome evaluate vit_base_patch16_224 --data ImageNet --root /data/imagenet --dtype float16 --device cuda
  torchrun --nproc-per-node 8 -m -- tome evaluate vit_base_patch16_224 --data val/ --r 8 --json out.json --resume
"""
HOSTS = """\b
Examples:
  tome hosts
  tome info torchvision:vit_b_16 --r 8
  tome bench hf:facebook/dinov2-base --r 8
"""
TUNE = """\b
Examples:
  tome tune vit_small_patch16_224 --data photos/ --speedup 1.5 --json tuned.json --plot tokens.png
  tome tune vit_base_patch16_224 --data val/ --max-drop 0.5 --batch-size 256 --dtype float16 --device cuda
  tome tune my_models:digits_vit --data digits --agreement 0.995 --mean 0.5 --std 0.5 --crop 1.0
  tome bench vit_small_patch16_224 --r tuned.json
"""
REPORT = """\b
Examples:
  tome report vit_small_patch16_224 --data photos/ --out report.html
  tome report vit_base_patch16_224 --data val/ --r 8 --r 16 --max-drop 0.5 --dtype float16 --device cuda
  tome report my_models:digits_vit --data digits --no-tune --mean 0.5 --std 0.5 --crop 1.0
"""
VISUALIZE = """\b
Examples:
  tome visualize photo.jpg --r 16,-1.0 --out merged/
  tome visualize photo.jpg --model vit_small_patch14_dinov2 --image-size 336x504 --layers
  tome visualize a.jpg b.png c.jpg --r 8 --layers --sheet all.png
  tome visualize photo.jpg --r 8 --gif
  tome visualize photo.jpg --model vit_base_patch16_224 --checkpoint weights.safetensors
"""
