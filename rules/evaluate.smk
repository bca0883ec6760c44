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
        gpu=get_gpus("evaluate"),
        nodes=get_nodes("evaluate"),
        mpi=over_nodes("evaluate", lambda stage, wildcards: "srun"),  # the launcher starts the tasks
        tasks_per_node=over_nodes("evaluate", get_processes),
        slurm_extra=over_nodes("evaluate", get_gpus_per_node),
        cpus_per_task=get_cpus("evaluate"),
        mem_mb=get_memory("evaluate", 32000),
        runtime=get_minutes("evaluate", 10, 10800),
    params:
        resolved=get_resolved,
        launcher=get_launcher("evaluate"),
    message:
        "Training classifiers on {wildcards.shard}"
    shell:
        "exec {params.launcher} workflow_scripts.stages.evaluate --resolved {params.resolved:q} --shard {wildcards.shard:q}"
        " --manifest {output:q} --log {log:q}"
