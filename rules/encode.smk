rule encode:
    input:
        get_needed("encode"),
    output:
        manifest("encode"),
    log:
        log_file("encode"),
    benchmark:
        benchmark_file("encode")
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        gpu=get_gpu,
        mem_mb=16000,
        runtime=get_minutes("encode", 5, 60),
    params:
        resolved=get_resolved,
    message:
        "Encoding the real images of shard {wildcards.shard}"
    shell:
        "exec python -m workflow_scripts.stages.encode --resolved {params.resolved:q} --shard {wildcards.shard:q}"
        " --manifest {output:q} --log {log:q}"
