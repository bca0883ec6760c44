rule fit_backbone:
    input:
        get_needed("fit_backbone"),
    output:
        manifest("fit_backbone"),
    log:
        log_file("fit_backbone"),
    benchmark:
        benchmark_file("fit_backbone")
    conda:
        "../envs/stillhouse.yaml"
    threads: workflow.resource_settings.cores or 8
    resources:
        gpu=get_gpus("fit_backbone"),
        nodes=1,
        mem_mb=get_fit_memory,
        runtime=get_minutes("fit_backbone", 240 if RUN.backbone.finetune is None else 720, 0),
    params:
        resolved=get_resolved,
        launcher=get_launcher("fit_backbone"),
    message:
        "Fitting a backbone on the training images"
    shell:
        "exec {params.launcher} workflow_scripts.stages.fit_backbone --resolved {params.resolved:q} --shard {wildcards.shard:q}"
        " --manifest {output:q} --log {log:q}"
