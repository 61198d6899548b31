"""`score init`, `score schema` and `score doctor`: what comes before the first night."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.terminal import Json, Set, load, print_json, print_text, show


def init(
    uri: Annotated[
        str, typer.Argument(metavar="DATA", help="Folder or s3://bucket/prefix with Parquet files.")
    ],
    model: Annotated[
        str, typer.Option(help="An ONNX file, or module:callable that returns a torch module.")
    ],
    name: Annotated[
        str | None, typer.Option(help="Of the job; that of the folder by default.")
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Where scores go; beside the data by default.")
    ] = None,
    file: Annotated[
        str | None, typer.Option(help="Where the job file goes; NAME.yaml by default.")
    ] = None,
    json: Json = False,
) -> None:
    """Write a job file with comments, from a look at the data and at the model."""
    from flows.init import InitRequest, render_init, write_job_file

    request = InitRequest(uri=uri, model=model, name=name, output=output)
    show(write_job_file(request, file), render_init, as_json=json)


def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the reference page, not the JSON schema.")
    ] = False,
) -> None:
    """Print the JSON schema of job files, which editors use to complete and check them."""
    from flows.config_reference import reference_text, schema_text

    print_text(reference_text() if markdown else schema_text())


def doctor(
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="Try what this job needs, too.")
    ] = None,
    sbom: Annotated[
        bool, typer.Option("--sbom", help="Print names, versions and licences as CycloneDX JSON.")
    ] = False,
    json: Json = False,
    set: Set = None,
) -> None:
    """Say what this machine can run, and what is missing for more and for a job."""
    from flows.doctor import doctor_facts, render_doctor

    if sbom:
        from flows.sbom import bill_of_materials

        print_json(bill_of_materials())
        return
    show(doctor_facts(load(job, set) if job else None), render_doctor, as_json=json)
