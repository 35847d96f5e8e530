"""``gkd records``: inspect, verify and pack face records."""

from pathlib import Path
from typing import Any

import click
import msgspec

from gkd.commands.options import LOCAL_PATH, OUTPUT_PATH, as_json, sort_option, workers_option
from gkd.commands.output import echo, emit, emit_json


@click.group(short_help="Inspect, verify and pack face records.")
def records() -> None:
    """Inspect, verify and pack face records."""


@records.command("info", short_help="Describe records.")
@click.argument("source", metavar="RECORDS", type=LOCAL_PATH)
@sort_option
@as_json
def records_info(source: Path, sort: Any, as_json: bool) -> None:
    """Describe RECORDS: packs, Parquet files, tar shards or an image folder."""
    from gkd.storage.records.check import records_info
    from gkd.storage.records.open import open_records

    found = records_info(open_records(source, sort=sort))
    info = msgspec.to_builtins(found, str_keys=True, enc_hook=str)
    if not as_json:
        named = {"0": "minimum", "50": "median", "100": "maximum"}
        info["images_per_identity"] = {
            named.get(percentile, f"{percentile}th percentile"): images
            for percentile, images in info["images_per_identity"].items()
        }
    emit(info, as_json)


@records.command("verify", short_help="Decode every image, list every fault.")
@click.argument("source", metavar="RECORDS", type=LOCAL_PATH)
@sort_option
@workers_option
@as_json
def records_verify(source: Path, sort: Any, workers: int, as_json: bool) -> None:
    """Read and decode every image of RECORDS and list every fault; exit with 1 if there is one."""
    from gkd.storage.records.check import verify_records
    from gkd.storage.records.open import open_records

    records = open_records(source, sort=sort)
    report = verify_records(records, workers=workers)
    faults = [str(fault) for fault in report.faults]
    if as_json:
        counts = {"images": report.images, "identities": report.identities}
        left_out = {"left_out": list(records.left_out), "conversions": report.conversions}
        emit_json({**counts, "faults": faults, **left_out})
    else:
        problems = {fault.problem for fault in report.faults}
        if len(faults) == report.images > 1 == len(problems):
            echo(f"{source}: all {report.images:,} images: {problems.pop()}")
        else:
            for fault in faults:
                echo(fault)
        for line in records.left_out:
            echo(f"left out: {line}")
        echo(f"{report.images:,} images, {report.identities:,} identities, {len(faults):,} faults")
        for what, count in report.conversions.items():
            echo(f"{count:,} images: {what}")
    if faults:
        raise SystemExit(1)


@records.command("pack", short_help="Pack records of any form as train.rec.")
@click.argument("source", metavar="RECORDS", type=LOCAL_PATH)
@click.argument("out", type=OUTPUT_PATH)
@sort_option
@click.option(
    "--resize",
    is_flag=True,
    help="Bring images of another size to 112x112 and encode them again as JPEG of quality 95.",
)
@workers_option
@as_json
def records_pack(
    source: Path, out: Path, sort: Any, resize: bool, workers: int, as_json: bool
) -> None:
    """Pack RECORDS of any form as OUT/train.rec, in their order; MXNet reads it too.

    Images are copied byte for byte, so a cache of RECORDS matches OUT as well, unless --resize
    has to make them anew.
    """
    from gkd.storage.records.write_pack import pack

    emit(pack(source, out, sort=sort, resize=resize, workers=workers), as_json)
