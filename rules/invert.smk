rule invert:
    input:
        get_needed("invert"),
    output:
        manifest("invert"),
    log:
        log_file("invert"),
    benchmark:
        benchmark_file("invert")
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        gpu=get_gpu,
        mem_mb=16000,
        runtime=get_minutes("invert", 10, 300),
    params:
        resolved=get_resolved,
    message:
        "Inverting the latents of shard {wildcards.shard}"
    shell:
        "exec python -m workflow_scripts.stages.invert --resolved {params.resolved:q} --shard {wildcards.shard:q}"
        " --manifest {output:q} --log {log:q}"
