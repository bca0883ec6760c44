rule teacher:
    input:
        get_needed("teacher"),
    output:
        manifest("teacher"),
    log:
        log_file("teacher"),
    benchmark:
        benchmark_file("teacher")
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        gpu=get_gpu,
        mem_mb=64000,
        runtime=get_minutes("teacher", 60, 39600),
    params:
        resolved=get_resolved,
    message:
        "Training teacher of {wildcards.shard}"
    shell:
        "exec python -m workflow_scripts.stages.teacher --resolved {params.resolved:q} --shard {wildcards.shard:q}"
        " --manifest {output:q} --log {log:q}"
