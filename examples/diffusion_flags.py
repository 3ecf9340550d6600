"""The flags of finetune_diffusion.py."""

import argparse
from pathlib import Path

from diffusers.optimization import SchedulerType
from plumbing import add_preset, number, parser_of

LR = 1e-4  # where none is found
PRECISIONS = ("auto", "no", "bf16", "fp16")


def flags_of(doc: str, argv: list[str] | None) -> argparse.Namespace:
    """doc: what --help begins with."""
    parser = parser_of(doc)
    count, size = number(int, 0), number(int, 1)
    switch = argparse.BooleanOptionalAction

    add = parser.add_argument_group("what").add_argument
    add("--model", required=True, help="diffusers pipeline, folder or hub name")
    add("--variant", help="of its files: fp16")
    add("--revision", help="of a hub name")
    add("--data", type=Path, required=True, help="folder of pictures with captions")
    add("--caption", help="for pictures that have none; without it they are skipped")
    add("--output", type=Path, default=Path("runs/diffusion"), help="folder for all results")
    add("--method", choices=("lora", "oplora"), default="oplora", help="what to train")

    add = parser.add_argument_group("pictures").add_argument
    add("--resolution", type=size, help="sides of the pictures, in pixels (default: the model's)")
    add("--min-size", type=size, help="skip pictures with a shorter side (default: half the resolution)")
    add("--random-crop", action="store_true", help="crop anywhere instead of at the centre; turns latent caching off")
    add("--random-flip", action="store_true", help="mirror half of the draws; doubles the latents cached")
    add("--cache-latents", action=switch, default=True, help="encode pictures once; the VAE leaves the device")
    add("--cache-text", action=switch, default=True, help="encode captions once; the text encoders leave the memory")
    add("--workers", type=count, default=0, help="processes that read pictures; useful without cached latents")

    add = parser.add_argument_group("adapter").add_argument
    add("--r", type=size, default=4, help="rank")
    add(
        "--lora-alpha",
        type=number(float, 0, open_low=True),
        help="the adapter's output is scaled by alpha / r (default: r)",
    )
    add("--lora-dropout", type=number(float, 0, 0.99), default=0.0, help="on the adapter's input")
    add("--dora", action="store_true", help="train magnitudes too (DoRA)")
    add(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        default=["to_q", "to_k", "to_v", "to_out.0"],
        help="layers of the denoiser",
    )
    add("--train-text-encoder", action="store_true", help="adapt the text encoders too (Flux: the CLIP one)")
    add(
        "--text-encoder-target-modules",
        nargs="+",
        metavar="NAME",
        default=["q_proj", "k_proj", "v_proj", "out_proj"],
        help="their layers",
    )

    add = parser.add_argument_group("OP-LoRA").add_argument
    add_preset(add, "--lr")
    add("--hidden-width", type=size, help="units of a generator, for presets paper and flat (default: 32)")
    add("--oplora-state", choices=("lean", "exact"), help="how these generators are kept (default: lean)")

    add = parser.add_argument_group("training").add_argument
    add("--steps", type=size, default=1000, help="steps of the optimizer")
    add("--batch-size", type=size, default=1, help="pictures in a forward pass, in each process")
    add("--grad-accumulation", type=size, default=1, help="forward passes to a step")
    add(
        "--lr",
        type=number(float, 0, open_low=True),
        help=f"learning rate; preset auto needs none, and takes only a schedule's course from it (else: {LR:g})",
    )
    add(
        "--lr-scheduler",
        choices=[s.value for s in SchedulerType if s.value != "piecewise_constant"],
        default="constant",
        help="of diffusers",
    )
    add("--warmup", type=count, default=0, help="steps in which the rate rises, for schedules that have it")
    add("--betas", type=number(float, 0, 1), nargs=2, help="of AdamW (default: 0.9 0.999, of preset auto 0.9 0.99)")
    add("--eps", type=number(float, 0, open_low=True), default=1e-8, help="of AdamW")
    add("--weight-decay", type=number(float, 0), default=0.01, help="of AdamW")
    add("--max-grad-norm", type=number(float, 0), default=1.0, help="clip the gradient's norm; 0: don't")
    add("--snr-gamma", type=number(float, 0, open_low=True), help="weigh losses by min-SNR, often 5 (not Flux)")
    add(
        "--mixed-precision",
        choices=PRECISIONS,
        default="auto",
        help="auto: bf16 on GPUs that have it, none on the CPU",
    )
    add("--gradient-checkpointing", action=switch, default=True, help="less memory, slower")
    add("--seed", type=count, default=0, help="of adapter, generators, order, noise and validation pictures")

    add = parser.add_argument_group("Flux").add_argument
    add(
        "--timestep-sampling",
        choices=("logit-normal", "shift", "uniform"),
        default="logit-normal",
        help="shift: logit-normal, then moved to more noise at high resolution as the pipeline does",
    )
    add("--logit-mean", type=float, default=0.0, help="of the logit-normal")
    add("--logit-std", type=number(float, 0, open_low=True), default=1.0, help="of the logit-normal")
    add("--guidance", type=number(float, 0), default=3.5, help="told to models that embed it (dev)")
    add("--max-sequence-length", type=number(int, 1, 512), default=512, help="tokens of a caption for T5")

    add = parser.add_argument_group("evaluation").add_argument
    add(
        "--held-out-fraction",
        type=number(float, 0, 0.99),
        default=0.0,
        help="of the pictures, kept back for a held-out loss",
    )
    add("--held-out-draws", type=size, default=4, help="timesteps for each of them")
    add("--seed-held-out", type=count, default=0, help="of their choice, noise and timesteps")
    add("--eval-steps", type=count, default=100, metavar="N", help="steps between held-out losses; 0: at start and end")
    add("--validation-prompt", help="draw pictures of it")
    add("--negative-prompt", default="", help="for these (not Flux)")
    add("--validation-steps", type=count, default=100, metavar="N", help="steps between them; 0: never")
    add("--num-validation-images", type=size, default=4, metavar="N", help="pictures each time")
    add("--inference-steps", type=size, default=25, help="sampling steps for a picture")
    add("--validation-guidance", type=number(float, 0), help="guidance scale (default: the pipeline's)")

    add = parser.add_argument_group("results").add_argument
    add("--kohya", action="store_true", help="also write the file of kohya's scripts, for ComfyUI and others")
    add("--checkpointing-steps", type=count, default=500, metavar="N", help="steps between checkpoints; 0: none")
    add("--checkpoints-total-limit", type=count, default=2, metavar="N", help="newest checkpoints to keep; 0: all")
    add("--resume-from-checkpoint", metavar="NAME", help='continue from a checkpoint, or from the "latest"')

    args = parser.parse_args(argv)
    args.cache_latents = args.cache_latents and not args.random_crop
    args.cache_text = args.cache_text and not args.train_text_encoder
    if args.method == "lora" or args.preset != "auto":
        args.lr = LR if args.lr is None else args.lr
    else:
        for flag, value in (("--hidden-width", args.hidden_width), ("--oplora-state", args.oplora_state)):
            if value is not None:
                parser.error(f"{flag} is for --preset paper and flat; auto, the default, has no generator in a layer")
    return args
