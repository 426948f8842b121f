"""`gptoss-convert export`: the command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptoss_convert.cli.output import emit, human_bytes, progress

if TYPE_CHECKING:
    from rich.console import Console

    from gptoss_convert.convert.exports.write import Exported


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--for",
    "platform",
    required=True,
    metavar="PLATFORM",
    help="sagemaker, bedrock, azureml, foundry-local, llama.cpp, ollama, lmstudio, northflank or huggingface.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--name", help="What the deployment, or the repository (OWNER/NAME), is called.")
@click.option("--instance", metavar="TYPE", help="Machine type, as the platform calls it.")
@click.option("--image", help="Container image, in place of the platform's own.")
@click.option(
    "--engine", help="sagemaker: lmi or vllm; azureml: vllm or mlflow; foundry-local: its ONNX Runtime, such as 1.31."
)
@click.option("--bucket", metavar="s3://BUCKET/PREFIX", help="Where the model will lie.")
@click.option("--role", metavar="ARN", help="The execution role.")
@click.option("--region", help="AWS region.")
@click.option("--context", type=click.IntRange(1, 131072), help="Tokens of context to serve.")
@click.option("--archive", is_flag=True, help="sagemaker: model.tar.gz instead of a prefix.")
@click.option("--base-model", metavar="OWNER/NAME", help="huggingface: what the artifact was made from.")
@click.option("--quality", type=click.Path(path_type=Path), help="huggingface: what compare --json has printed.")
@click.option("--push", is_flag=True, help="huggingface: upload the folder to --name, private if it is new.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout: the manifest.")
def command(
    artifact: Path, platform: str, out: Path, push: bool, overwrite: bool, as_json: bool, **wishes: Any
) -> None:
    """Write ARTIFACT, a folder or GGUF that convert wrote, as a folder that PLATFORM deploys.

    An artifact that the platform cannot serve is refused, with what to convert to.
    """
    from gptoss_convert.convert.exports.package import Request
    from gptoss_convert.convert.exports.push import push as upload
    from gptoss_convert.convert.exports.push import require_pushable
    from gptoss_convert.convert.exports.write import export

    repo = require_pushable(platform, wishes["name"]) if push else None
    found = export(artifact, out, platform, Request(**wishes), overwrite=overwrite, show=progress)
    if repo is not None:
        pushed = upload(found.target, repo)
        found.document["pushed"] = {"repo": pushed.repo, "commit": pushed.commit, "url": pushed.url}
        found.first_steps[:] = [f"open {pushed.url}: private if it is new"]
        if pushed.others:
            found.document["pushed"]["others"] = list(pushed.others)
            found.first_steps.append(
                f"files of earlier uploads are still there; remove what is none of it: {', '.join(pushed.others)}"
            )
    emit(found.document, as_json, lambda console: _show(console, found))


def _show(console: Console, found: Exported) -> None:
    document = found.document
    total = sum(file["bytes"] for file in document["files"])
    console.print(f"written  {found.target}: {len(document['files'])} files, {human_bytes(total)}", markup=False)
    for note in document["notes"]:
        console.print(f"note     {note}", markup=False)
    for number, step in enumerate(found.first_steps, 1):
        console.print(f"{number:>7}  {step}", markup=False)
