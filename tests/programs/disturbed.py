"""Run one of the project's commands in a process that differs from a usual one.

python -m tests.programs.disturbed [--file-bytes=N] [--interruptible] [--prefill-tokens=N] [--said=FILE] -- MODULE ...
"""

import argparse
import resource
import runpy
import signal
import sys


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--file-bytes", type=int, help="no file may grow beyond, as on a disk that is full")
    parser.add_argument("--interruptible", action="store_true", help="SIGINT is Ctrl-C, whoever started the process")
    parser.add_argument("--prefill-tokens", type=int, help="tokens of the clean pass at once")
    parser.add_argument("--said", help="where what Python prints goes; libraries of C++ print elsewhere")
    parser.add_argument("command", nargs="+", help="the module and its arguments")
    options = parser.parse_args()
    if options.file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.file_bytes, options.file_bytes))
    if options.interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if options.prefill_tokens:
        from hydra_jax.engine import memory, walk

        walk.PREFILL_TOKENS = memory.PREFILL_TOKENS = options.prefill_tokens
    if options.said:
        sys.stdout = open(options.said, "w", encoding="utf-8")  # noqa: SIM115  (open until the end)
    module, *sys.argv[1:] = options.command
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
