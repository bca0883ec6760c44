rule features:
    input:
        get_needed("features"),
    output:
        manifest("features"),
    log:
        log_file("features"),
    benchmark:
        benchmark_file("features")
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        gpu=get_gpu,
        mem_mb=16000,
        runtime=get_minutes("features", 5, 60),
    params:
        resolved=get_resolved,
    message:
        "Computing features of the real images of shard {wildcards.shard}"
    shell:
        "exec python -m workflow_scripts.stages.features --resolved {params.resolved:q} --shard {wildcards.shard:q}"
        " --manifest {output:q} --log {log:q}"
