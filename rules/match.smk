rule match:
    input:
        get_needed("match"),
    output:
        manifest("match"),
    log:
        log_file("match"),
    benchmark:
        benchmark_file("match")
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        gpu=get_gpu,
        mem_mb=32000,
        runtime=get_minutes("match", 10, 14400),
    params:
        resolved=get_resolved,
    message:
        "Matching {wildcards.shard}"
    shell:
        "exec python -m workflow_scripts.stages.match --resolved {params.resolved:q} --shard {wildcards.shard:q}"
        " --manifest {output:q} --log {log:q}"
