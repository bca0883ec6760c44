rule measure:
    input:
        get_needed("measure"),
    output:
        manifest("measure"),
    log:
        log_file("measure"),
    benchmark:
        benchmark_file("measure")
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        gpu=get_gpu,
        mem_mb=32000,
        runtime=get_minutes("measure", 10, 60),
    params:
        resolved=get_resolved,
    message:
        "Measuring the sets of {wildcards.shard}"
    shell:
        "exec python -m workflow_scripts.stages.measure --resolved {params.resolved:q} --shard {wildcards.shard:q}"
        " --manifest {output:q} --log {log:q}"
