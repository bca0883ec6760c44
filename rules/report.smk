rule report:
    input:
        get_needed("report"),
    output:
        manifest("report"),
    log:
        log_file("report"),
    benchmark:
        benchmark_file("report")
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=8000,
        runtime=get_minutes("report", 30, 0),
    params:
        resolved=get_resolved,
    message:
        "Writing the report"
    shell:
        "exec python -m workflow_scripts.stages.report --resolved {params.resolved:q} --shard {wildcards.shard:q}"
        " --manifest {output:q} --log {log:q}"
