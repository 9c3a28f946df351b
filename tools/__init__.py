"""The offline workshop: one stage a file, each with `main(argv) -> int`; `lowbit <stage>` runs them."""
