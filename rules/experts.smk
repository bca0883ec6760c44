rule experts:
    input:
        get_needed("experts"),
    output:
        manifest("experts"),
    log:
        log_file("experts"),
    benchmark:
        benchmark_file("experts")
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        gpu=get_gpu,
        mem_mb=32000,
        runtime=get_minutes("experts", 10, 300),
    params:
        resolved=get_resolved,
    message:
        "Training experts of {wildcards.shard}"
    shell:
        "exec python -m workflow_scripts.stages.experts --resolved {params.resolved:q} --shard {wildcards.shard:q}"
        " --manifest {output:q} --log {log:q}"
