"""Retrofit a language model with Dynamic Memory Compression, through Megatron's training loop.

    torchrun --nproc-per-node 8 pretrain_dmc.py --dmc-stage retrofit --dmc-target-cr 4 MEGATRON_FLAGS

Takes the flags of Megatron-LM's pretrain_gpt.py and the `--dmc-*` group (`--help` lists them), and refuses
those that it cannot follow (docs/flags.md). The stages follow each other: zero-out, retrofit, finetune;
`--dmc-stage off` is plain pretraining, with Megatron's own model.
"""

if __name__ == "__main__":
    # Here, because the processes that Megatron starts to write checkpoints import this file again.
    from megatron_dmc.quiet import silence_optional_packages

    silence_optional_packages()
    from megatron_dmc.startup import compiling_at_first_call

    with compiling_at_first_call():
        from megatron_dmc.training.run import main

    main()
