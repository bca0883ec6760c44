rule relabel:
    input:
        get_needed("relabel"),
    output:
        manifest("relabel"),
    log:
        log_file("relabel"),
    benchmark:
        benchmark_file("relabel")
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        gpu=get_gpu,
        mem_mb=32000,
        runtime=get_minutes("relabel", 20, 120),
    params:
        resolved=get_resolved,
    message:
        "Training relabel of {wildcards.shard}"
    shell:
        "exec python -m workflow_scripts.stages.relabel --resolved {params.resolved:q} --shard {wildcards.shard:q}"
        " --manifest {output:q} --log {log:q}"
