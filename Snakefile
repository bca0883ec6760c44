# Stillhouse: distil a large image dataset into a few synthetic images per class, and measure how good they are.
#
#   results/store/<stage>.zarr/<class>/<digest>      class-level results, addressed by what they are made from
#   results/manifests/<stage>/<shard>.<digest>.json  one per job: all that it had to make exists
#   results/datasets/<method>-ipc<k>-seed<s>.<digest>/<class>/*.png
#   results/<run>/report/index.html
#
# A manifest's path holds the digest of what its job makes. A class that became invalid is a manifest that does not exist
# yet, so existence of paths is all that decides what runs: no timestamps, no metadata in .snakemake.

from snakemake.utils import min_version

min_version("9.27")


configfile: "config.yaml"


include: "rules/common.smk"
include: "rules/fit_backbone.smk"
include: "rules/encode.smk"
include: "rules/features.smk"
include: "rules/cluster.smk"
include: "rules/invert.smk"
include: "rules/experts.smk"
include: "rules/sample.smk"
include: "rules/match.smk"
include: "rules/export.smk"
include: "rules/teacher.smk"
include: "rules/relabel.smk"
include: "rules/evaluate.smk"
include: "rules/measure.smk"
include: "rules/report.smk"


rule all:
    default_target: True
    input:
        get_all_manifests(),
    localrule: True


onsuccess:
    announce_report()


onerror:
    announce_failures()
