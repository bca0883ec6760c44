rule sample:
    input:
        get_needed("sample"),
    output:
        manifest("sample"),
    log:
        log_file("sample"),
    benchmark:
        benchmark_file("sample")
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        gpu=get_gpu,
        mem_mb=16000,
        runtime=get_minutes("sample", 10, 60),
    params:
        resolved=get_resolved,
    message:
        "Sampling {wildcards.shard}"
    shell:
        "exec python -m workflow_scripts.stages.sample --resolved {params.resolved:q} --shard {wildcards.shard:q}"
        " --manifest {output:q} --log {log:q}"
