rule evaluate:
    input:
        get_needed("evaluate"),
    output:
        manifest("evaluate"),
    log:
        log_file("evaluate"),
    benchmark:
        benchmark_file("evaluate")
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        gpu=get_gpu,
        mem_mb=32000,
        runtime=get_minutes("evaluate", 10, 10800),
    params:
        resolved=get_resolved,
    message:
        "Training classifiers on {wildcards.shard}"
    shell:
        "exec python -m workflow_scripts.stages.evaluate --resolved {params.resolved:q} --shard {wildcards.shard:q}"
        " --manifest {output:q} --log {log:q}"
