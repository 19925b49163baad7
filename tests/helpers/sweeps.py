"""Sweeps of a tiny model as commands, by one process or several."""

from hydra_jax.store import effects as store
from tests.helpers import checkpoints, commands
from tests.helpers.commands import finish, free_port

REPLACEMENTS = 3


def inputs(directory, prompts):
    """A directory with a model and so many prompts."""
    checkpoints.gguf_file(directory / "tiny.gguf")
    records = [{"id": f"p{i}", "prompt": f"the {i} of {'x' * (i % 9)} in"} for i in range(prompts)]
    checkpoints.json_lines(directory / "prompts.jsonl", records)
    return directory


def settings(inputs, workdir):
    """Arguments of `launch.sweep`."""
    return [
        f"--config.model={inputs}/tiny.gguf",
        f"--config.prompts.path={inputs}/prompts.jsonl",
        "--config.prompts.correct_only=False",
        f"--config.ablation.replacements={REPLACEMENTS}",
        "--noreport",
        f"--workdir={workdir}",
    ]


def start(inputs, workdir, *arguments, processes=1, devices=1, disturbed=(), said=None):
    """The sweep, begun: its processes. Process N prints into the file `said-N` of a directory `said`."""
    where = [[]]
    if processes > 1:
        shared = f"--coordinator=127.0.0.1:{free_port()}", f"--processes={processes}"
        where = [[*shared, f"--process={number}"] for number in range(processes)]
    every = [*settings(inputs, workdir), *arguments]
    files = [said and said / f"said-{number}" for number in range(processes)]
    return [
        commands.start("launch.sweep", *every, *own, devices=devices, disturbed=disturbed, said=file)
        for own, file in zip(where, files, strict=True)
    ]


def done(inputs, workdir, *arguments, **options):
    """The sweep, ended well: its processes."""
    processes = list(map(finish, start(inputs, workdir, *arguments, **options)))
    for process in processes:
        assert process.returncode == 0, process.err
    return processes


def written(workdir):
    """When each chunk's flag was written, which comes last."""
    chunks = (workdir / store.NAME / "finished" / "c").glob("*")  # and parts of what is being written
    return {path.name: path.stat().st_mtime_ns for path in chunks if path.name.isdecimal()}
