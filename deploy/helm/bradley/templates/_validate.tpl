{{/*
  Checks of several values together, which the schema cannot express. Every message says what to do.
*/}}
{{- define "bradley.validate" -}}
{{- $v := .Values -}}
{{- $wrong := list -}}
{{- $managed := .Files.Get "files/managed-settings.yaml" | required "files/managed-settings.yaml is not in the chart" | fromYaml -}}
{{- range $name, $instead := $managed -}}
{{- if hasKey $v.config $name -}}
{{- $wrong = append $wrong (printf "config.%s is set by the chart: remove it, and use %s" $name $instead) -}}
{{- end -}}
{{- end -}}
{{- $database := or $v.database.url $v.database.existingSecret -}}
{{- if and $v.database.url $v.database.existingSecret -}}
{{- $wrong = append $wrong "database.url and database.existingSecret are both set: keep one" -}}
{{- end -}}
{{- if and $database (not $v.artifacts.url) -}}
{{- $wrong = append $wrong "a database is set, but not artifacts.url: replicas that share a database must find the same files" -}}
{{- end -}}
{{- if and (include "bradley.several" .) (not (and $database $v.artifacts.url)) -}}
{{- $wrong = append $wrong "more than one replica needs database.url (or database.existingSecret) and artifacts.url: SQLite and files on a volume belong to one process" -}}
{{- end -}}
{{- $shared := include "bradley.shared" . -}}
{{- if and $v.persistence.existingClaim (not $v.persistence.enabled) (not $shared) -}}
{{- $wrong = append $wrong "persistence.existingClaim is set, but persistence.enabled is false: the data would be lost with the pod; remove one of them" -}}
{{- end -}}
{{- $update := $v.rollingUpdate -}}
{{- if and $shared (regexMatch "^0+%?$" (include "bradley.text" $update.maxSurge)) (regexMatch "^0+%?$" (include "bradley.text" $update.maxUnavailable)) -}}
{{- $wrong = append $wrong "rollingUpdate.maxSurge and rollingUpdate.maxUnavailable are both 0, which Kubernetes refuses: set one of them to 1" -}}
{{- end -}}
{{- if and $v.artifacts.secretEnv $v.artifacts.existingSecret -}}
{{- $wrong = append $wrong "artifacts.secretEnv and artifacts.existingSecret are both set: keep one" -}}
{{- end -}}
{{- if and $v.huggingface.token $v.huggingface.existingSecret -}}
{{- $wrong = append $wrong "huggingface.token and huggingface.existingSecret are both set: keep one" -}}
{{- end -}}
{{- if and $v.autoscaling.hpa.enabled $v.autoscaling.keda.enabled -}}
{{- $wrong = append $wrong "autoscaling.hpa and autoscaling.keda are both enabled: KEDA makes a HorizontalPodAutoscaler of its own, keep one" -}}
{{- end -}}
{{- if lt (int $v.autoscaling.maxReplicas) (int $v.autoscaling.minReplicas) -}}
{{- $wrong = append $wrong "autoscaling.maxReplicas is below autoscaling.minReplicas" -}}
{{- end -}}
{{- $inline := or $v.tls.certificate $v.tls.key $v.tls.ca -}}
{{- if $v.tls.enabled -}}
{{- if and $inline $v.tls.existingSecret -}}
{{- $wrong = append $wrong "tls.existingSecret and tls.certificate, tls.key or tls.ca are both set: keep one" -}}
{{- else if not (or $v.tls.existingSecret (and $v.tls.certificate $v.tls.key)) -}}
{{- $wrong = append $wrong "tls.enabled needs tls.existingSecret, or tls.certificate and tls.key" -}}
{{- end -}}
{{- else if or $inline $v.tls.existingSecret $v.tls.clientCa.existingSecret -}}
{{- $wrong = append $wrong "certificates are set, but tls.enabled is false: the port would be plain text" -}}
{{- end -}}
{{- if $v.modelCache.prePull.enabled -}}
{{- if not $v.modelCache.existingClaim -}}
{{- $wrong = append $wrong "modelCache.prePull needs modelCache.existingClaim: the data's volume does not exist before the first pod" -}}
{{- end -}}
{{- if $v.huggingface.token -}}
{{- $wrong = append $wrong "modelCache.prePull needs huggingface.existingSecret instead of huggingface.token: the Job runs before the chart's Secret exists" -}}
{{- end -}}
{{- if $v.huggingface.offline -}}
{{- $wrong = append $wrong "modelCache.prePull and huggingface.offline are both set: the Job has to ask the hub" -}}
{{- end -}}
{{- end -}}
{{- with $v.scoreFiles -}}
{{- if .enabled -}}
{{- if not (and .inputs .out .policy) -}}
{{- $wrong = append $wrong "scoreFiles.enabled needs scoreFiles.inputs, scoreFiles.out and scoreFiles.policy" -}}
{{- end -}}
{{- if and $v.auth.tokens (not .models) (not .tokenSecret) -}}
{{- $wrong = append $wrong "scoreFiles needs scoreFiles.tokenSecret, because auth.tokens is true and the servers score" -}}
{{- end -}}
{{- if and $v.tls.clientCa.existingSecret (not .models) (not .clientSecret) -}}
{{- $wrong = append $wrong "scoreFiles needs scoreFiles.clientSecret, because clients need a certificate (tls.clientCa) and the servers score" -}}
{{- end -}}
{{- if and .models (contains "trainingJobs/" (print .policy " " .reference)) -}}
{{- $wrong = append $wrong "scoreFiles.policy or scoreFiles.reference is a checkpoint of the servers, but scoreFiles.models lets each pod score by itself: export the checkpoint and name it in scoreFiles.models, or leave that empty" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $v.auth.declared.tokens $v.auth.declared.existingSecret -}}
{{- $wrong = append $wrong "auth.declared.tokens and auth.declared.existingSecret are both set: keep one" -}}
{{- end -}}
{{- if and (or (include "bradley.tokenFile" .) $v.auth.oidc.issuer) (not $v.auth.tokens) -}}
{{- $wrong = append $wrong "auth.declared or auth.oidc is set, but auth.tokens is false: everyone could do everything" -}}
{{- end -}}
{{- if and $v.auth.oidc.issuer (not (and $v.auth.oidc.audiences $v.auth.oidc.roles)) -}}
{{- $wrong = append $wrong "auth.oidc.issuer needs auth.oidc.audiences and auth.oidc.roles: without them, tokens for other services would be accepted, or no token would have a role" -}}
{{- end -}}
{{- if and (hasKey $v.config "device_memory_limit") (not $v.gpu.enabled) -}}
{{- $wrong = append $wrong "config.device_memory_limit limits the memory of GPUs, but gpu.enabled is false: remove it, or set config.memory_limit for the host's memory" -}}
{{- end -}}
{{- if and $v.gpu.enabled (contains "/mig-" $v.gpu.resource) (gt (int $v.gpu.count) 1) -}}
{{- $wrong = append $wrong "gpu.count is above 1, but a process can use only one MIG slice: set it to 1, and use replicas for more slices" -}}
{{- end -}}
{{- if and $v.grpcRoute.enabled (not $v.grpcRoute.parentRefs) -}}
{{- $wrong = append $wrong "grpcRoute.enabled needs grpcRoute.parentRefs" -}}
{{- end -}}
{{- if and $v.ingress.enabled (not $v.ingress.hosts) -}}
{{- $wrong = append $wrong "ingress.enabled needs ingress.hosts" -}}
{{- end -}}
{{- if $wrong -}}
{{- fail (printf "\n- %s" (join "\n- " $wrong)) -}}
{{- end -}}
{{- end -}}
