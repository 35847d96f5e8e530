"""``gkd records``: look at, check and make record packs."""

from pathlib import Path
from typing import Any

import click

from gkd.commands.shared import (
    PATH,
    as_json,
    emit,
    emit_json,
    printable,
    sort_option,
    workers_option,
)


@click.group()
def records() -> None:
    """Look at, check and make record packs."""


@records.command("info")
@click.argument("source", metavar="RECORDS", type=PATH)
@sort_option
@as_json
def records_info(source: Path, sort: Any, as_json: bool) -> None:
    """Say what RECORDS hold: packs, Parquet files, tar shards or an image folder."""
    from gkd.storage.records.check import records_info
    from gkd.storage.records.open import open_records

    emit(records_info(open_records(source, sort=sort)), as_json)


@records.command("verify")
@click.argument("source", metavar="RECORDS", type=PATH)
@sort_option
@workers_option
@as_json
def records_verify(source: Path, sort: Any, workers: int, as_json: bool) -> None:
    """Read and decode every image of RECORDS and list every fault; exit 1 if there is one."""
    from gkd.storage.records.check import verify_records
    from gkd.storage.records.open import open_records

    report = verify_records(open_records(source, sort=sort), workers=workers)
    faults = [str(fault) for fault in report.faults]
    if as_json:
        counts = {"images": report.images, "identities": report.identities}
        emit_json({**counts, "faults": faults})
    else:
        for fault in faults:
            click.echo(printable(fault))
        click.echo(
            f"{report.images:,} images, {report.identities:,} identities, {len(faults):,} faults"
        )
    if faults:
        raise SystemExit(1)


@records.command("pack")
@click.argument("source", metavar="RECORDS", type=PATH)
@click.argument("out", type=PATH)
@sort_option
@workers_option
@as_json
def records_pack(source: Path, out: Path, sort: Any, workers: int, as_json: bool) -> None:
    """Pack RECORDS of any kind into OUT/train.rec, which MXNet reads too, in their order.

    Images are copied byte for byte, so a cache of RECORDS serves OUT as well.
    """
    from gkd.storage.records.write_pack import pack

    emit(pack(source, out, sort=sort, workers=workers), as_json)
