# Snakemake's own report (snakemake --report FILE) holds what is marked with report() here.
REPORT = f"{RESULTS}/{RUN.run}/reports/{{digest}}"


rule report:
    input:
        [ancient(RESULTS / PLAN.job(*other).manifest) for other in PLAN.job("report", "report").needs],
    output:
        manifest=f"{RESULTS}/manifests/report/report.{{digest}}.json",
        page=report(f"{REPORT}/index.html", caption="report.rst", category="Report"),
        leaderboard=report(f"{REPORT}/leaderboard.csv", caption="report.rst", category="Tables"),
        comparisons=report(f"{REPORT}/comparisons.csv", caption="report.rst", category="Tables"),
        figures=report(
            directory(f"{REPORT}/figures"), patterns=["{name}.svg"], caption="report.rst", category="Figures"
        ),
    log:
        f"{RESULTS}/logs/report/report.{{digest}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/report/report.{{digest}}.tsv"
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=8000,
        runtime=60,
    params:
        resolved=get_resolved,
    message:
        "Writing the report"
    shell:
        "exec python -m workflow_scripts.stages.report --resolved {params.resolved:q} --shard report"
        " --manifest {output.manifest:q} --log {log:q}"
