rule export:
    input:
        get_needed("export"),
    output:
        manifest("export"),
    log:
        log_file("export"),
    benchmark:
        benchmark_file("export")
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=4000,
        runtime=get_minutes("export", 5, 600),
    params:
        resolved=get_resolved,
    message:
        "Exporting the images of {wildcards.shard}"
    shell:
        "exec python -m workflow_scripts.stages.export --resolved {params.resolved:q} --shard {wildcards.shard:q}"
        " --manifest {output:q} --log {log:q}"
