rule cluster:
    input:
        get_needed("cluster"),
    output:
        manifest("cluster"),
    log:
        log_file("cluster"),
    benchmark:
        benchmark_file("cluster")
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=8000,
        runtime=get_minutes("cluster", 5, 30),
    params:
        resolved=get_resolved,
    message:
        "Clustering the latents of shard {wildcards.shard}"
    shell:
        "exec python -m workflow_scripts.stages.cluster --resolved {params.resolved:q} --shard {wildcards.shard:q}"
        " --manifest {output:q} --log {log:q}"
