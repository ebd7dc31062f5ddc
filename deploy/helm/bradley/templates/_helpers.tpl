{{- define "bradley.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Labels that select the release's objects. They must never change: selectors are immutable. */}}
{{- define "bradley.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "bradley.serverLabels" -}}
{{ include "bradley.selectorLabels" . }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "bradley.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "bradley.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "bradley.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "bradley.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/*
  global.imageRegistry replaces image.registry, as in the charts that a parent chart may have beside
  this one.
*/}}
{{- define "bradley.image" -}}
{{- with default .Values.image.registry .Values.global.imageRegistry -}}
{{ trimSuffix "/" . }}/
{{- end -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}{{ if .Values.gpu.enabled }}{{ .Values.gpu.imageTagSuffix }}{{ end }}
{{- end -}}
{{- end -}}

{{/* The pull secrets of all pods: those of the parent chart, which may be names only, and our own. */}}
{{- define "bradley.pullSecrets" -}}
{{- $secrets := list -}}
{{- range concat .Values.global.imagePullSecrets .Values.imagePullSecrets -}}
{{- $secrets = append $secrets (ternary (dict "name" .) . (kindIs "string" .)) -}}
{{- end -}}
{{- with $secrets | uniq -}}
imagePullSecrets:
{{- toYaml . | nindent 2 }}
{{- end -}}
{{- end -}}

{{/* The setting `device` of a GPU pod: all of its GPUs, by number, unless gpu.device is set. */}}
{{- define "bradley.device" -}}
{{- $devices := list -}}
{{- range until (int .Values.gpu.count) -}}
{{- $devices = append $devices (printf "cuda:%d" .) -}}
{{- end -}}
{{- default (join "," $devices) .Values.gpu.device -}}
{{- end -}}

{{/* files/alerts.yaml with the changes that metrics.alerts asks for. */}}
{{- define "bradley.alerts" -}}
{{- $alerts := .Values.metrics.alerts -}}
{{- $file := .Files.Get "files/alerts.yaml" | required "files/alerts.yaml is not in the chart" | fromYaml -}}
{{- $threshold := "([<>]=?)\\s*[0-9.]+$" -}}
{{- $names := list -}}
{{- $groups := list -}}
{{- range $group := $file.groups -}}
{{- $rules := list -}}
{{- range $rule := $group.rules -}}
{{- $name := $rule.alert -}}
{{- $names = append $names $name -}}
{{- if hasKey $alerts.thresholds $name -}}
{{- if not (regexMatch $threshold (trim $rule.expr)) -}}
{{- fail (printf "metrics.alerts.thresholds has %s, whose expression in files/alerts.yaml does not end with a threshold: remove it" $name) -}}
{{- end -}}
{{- $value := include "bradley.text" (get $alerts.thresholds $name) -}}
{{- $_ := set $rule "expr" (regexReplaceAll $threshold (trim $rule.expr) (printf "${1} %s" $value)) -}}
{{- end -}}
{{- $_ := set $rule "labels" (mergeOverwrite $rule.labels $alerts.labels) -}}
{{- with $alerts.runbookUrl -}}
{{- $_ := set $rule.annotations "runbook_url" (printf "%s#%s" (trimSuffix "#" .) (lower $name)) -}}
{{- end -}}
{{- if not (has $name $alerts.disabled) -}}
{{- $rules = append $rules $rule -}}
{{- end -}}
{{- end -}}
{{- with $rules -}}
{{- $groups = append $groups (dict "name" $group.name "rules" .) -}}
{{- end -}}
{{- end -}}
{{- range concat (keys $alerts.thresholds) $alerts.disabled | sortAlpha -}}
{{- if not (has . $names) -}}
{{- fail (printf "metrics.alerts names %s, which is no alert of files/alerts.yaml: use %s" . (join ", " $names)) -}}
{{- end -}}
{{- end -}}
{{- toYaml (dict "groups" $groups) -}}
{{- end -}}

{{/* Not empty if database and artifacts are outside the pod, so several replicas are possible. */}}
{{- define "bradley.shared" -}}
{{- if or .Values.database.url .Values.database.existingSecret -}}true{{- end -}}
{{- end -}}

{{- define "bradley.autoscaled" -}}
{{- if or .Values.autoscaling.hpa.enabled .Values.autoscaling.keda.enabled -}}true{{- end -}}
{{- end -}}

{{/* Not empty if there may be more than one replica. */}}
{{- define "bradley.several" -}}
{{- if or (include "bradley.autoscaled" .) (gt (int .Values.replicaCount) 1) -}}true{{- end -}}
{{- end -}}

{{/* Environment variables in the chart's own Secret. */}}
{{- define "bradley.secretData" -}}
{{- with .Values.database.url }}
BRADLEY_DATABASE_URL: {{ . | quote }}
{{- end }}
{{- with .Values.huggingface.token }}
HF_TOKEN: {{ . | quote }}
{{- end }}
{{- range $name, $value := .Values.artifacts.secretEnv }}
{{ $name }}: {{ $value | quote }}
{{- end }}
{{- end -}}

{{- define "bradley.tlsSecret" -}}
{{- default (printf "%s-tls" (include "bradley.fullname" .)) .Values.tls.existingSecret -}}
{{- end -}}

{{/* The key in that Secret of the authority that signed the server's certificate; empty if that is a public one. */}}
{{- define "bradley.caKey" -}}
{{- if and .Values.tls.enabled (or .Values.tls.existingSecret .Values.tls.ca) -}}
{{- ternary .Values.tls.caKey "ca.crt" (ne .Values.tls.existingSecret "") -}}
{{- end -}}
{{- end -}}

{{/* Not empty if a file declares tokens. */}}
{{- define "bradley.tokenFile" -}}
{{- if or .Values.auth.declared.tokens .Values.auth.declared.existingSecret -}}true{{- end -}}
{{- end -}}

{{- define "bradley.tokenSecret" -}}
{{- default (printf "%s-tokens" (include "bradley.fullname" .)) .Values.auth.declared.existingSecret -}}
{{- end -}}

{{/* Settings of an OIDC issuer. */}}
{{- define "bradley.oidcData" -}}
{{- with .Values.auth.oidc }}
{{- if .issuer }}
BRADLEY_OIDC_ISSUER: {{ .issuer | quote }}
BRADLEY_OIDC_AUDIENCE: {{ join "," .audiences | quote }}
BRADLEY_OIDC_OWNER_CLAIM: {{ .ownerClaim | quote }}
{{- with .rolesClaim }}
BRADLEY_OIDC_ROLES_CLAIM: {{ . | quote }}
{{- end }}
{{- $roles := list }}
{{- range $role, $values := .roles }}
{{- range $values }}
{{- $roles = append $roles (printf "%s=%s" $role .) }}
{{- end }}
{{- end }}
BRADLEY_OIDC_ROLES: {{ join "," $roles | quote }}
{{- with .jwksUrl }}
BRADLEY_OIDC_JWKS_URL: {{ . | quote }}
{{- end }}
{{- if .caSecret }}
BRADLEY_OIDC_CA_FILE: /etc/bradley/oidc-ca/ca.crt
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/*
  A setting's value as text. Helm reads numbers of a values file as floats, which it would write as
  4.194304e+06.
*/}}
{{- define "bradley.text" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) -}}
{{- printf "%.0f" . -}}
{{- else -}}
{{- toString . -}}
{{- end -}}
{{- end -}}

{{/* A quantity of memory in MiB, rounded down. */}}
{{- define "bradley.mib" -}}
{{- $text := include "bradley.text" . -}}
{{- if not (regexMatch "^[0-9]+(\\.[0-9]+)?(k|M|G|T|Ki|Mi|Gi|Ti)?$" $text) -}}
{{- fail (printf "resources.limits.memory is %q: the chart cannot compute BRADLEY_MEMORY_LIMIT of it; write it like 6Gi or 6000Mi, or set config.memory_limit" $text) -}}
{{- end -}}
{{- $number := regexFind "^[0-9.]+" $text | float64 -}}
{{- $bytes := dict "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- divf (mulf $number (get $bytes (regexFind "[a-zA-Z]*$" $text))) 1048576 | floor | int64 -}}
{{- end -}}

{{/*
  The limit on the host's memory, on CPU and on GPU pods: 0.9 · (limit − 1 GiB). The GiB is for the
  process that decodes an uploaded Parquet file. The tenth is for memory that estimates leave out.
  The limit does not concern a GPU's memory, for which the server asks each GPU at start, unless
  config.device_memory_limit is set.
*/}}
{{- define "bradley.memoryLimit" -}}
{{- $limits := default (dict) .Values.resources.limits -}}
{{- with $limits.memory -}}
{{- $mib := div (mul 9 (sub (int64 (include "bradley.mib" .)) 1024)) 10 -}}
{{- if lt $mib 512 -}}
{{- fail (printf "resources.limits.memory is %v: too little for a model beside the 1 GiB that decoding a Parquet file may take; 2Gi is the least, or set config.memory_limit" .) -}}
{{- end -}}
{{ $mib }}MiB
{{- end -}}
{{- end -}}

{{/* Environment variables for access to the hub, for the server and for the pre-pull Job. */}}
{{- define "bradley.hubEnv" -}}
- name: HF_HOME
  value: /var/lib/bradley/huggingface
{{- with .Values.huggingface.endpoint }}
- name: HF_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- with .Values.huggingface.existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.huggingface.existingSecretKey }}
{{- end }}
{{- end -}}

{{/* The names of the Services. A server without tokens and TLS answers REST under no others. */}}
{{- define "bradley.restHosts" -}}
{{- $namespace := .Release.Namespace -}}
{{- $names := list -}}
{{- range $service := list "" "-headless" -}}
{{- $name := printf "%s%s" (include "bradley.fullname" $) $service -}}
{{- $names = concat $names (list $name (printf "%s.%s" $name $namespace) (printf "%s.%s.svc" $name $namespace)) -}}
{{- end -}}
{{- append $names (printf "*.%s.svc.cluster.local" $namespace) | join "," -}}
{{- end -}}

{{- define "bradley.probe" -}}
httpGet:
  path: {{ .path }}
  port: http
{{- toYaml .timing | nindent 0 }}
{{- end -}}

{{/* Resources for one call of the command line. */}}
{{- define "bradley.smallResources" -}}
requests:
  cpu: 10m
  memory: 32Mi
limits:
  memory: 256Mi
{{- end -}}

{{/*
  Environment variables that are not secret. The checksum on the pod is of these alone, so a new
  version of the chart alone does not replace the pods.
*/}}
{{- define "bradley.configData" -}}
BRADLEY_MODELS: {{ join "," .Values.models | quote }}
BRADLEY_LISTEN: 0.0.0.0:50051
BRADLEY_HTTP_LISTEN: 0.0.0.0:9464
BRADLEY_DATA_DIR: /var/lib/bradley/data
{{- if .Values.gpu.enabled }}
BRADLEY_DEVICE: {{ include "bradley.device" . | quote }}
{{- end }}
{{- if not (hasKey .Values.config "memory_limit") }}
{{- with include "bradley.memoryLimit" . }}
BRADLEY_MEMORY_LIMIT: {{ . }}
{{- end }}
{{- end }}
{{- if .Values.auth.tokens }}
BRADLEY_AUTH: tokens
{{- end }}
{{- if not (hasKey .Values.config "rest_hosts") }}
BRADLEY_REST_HOSTS: {{ include "bradley.restHosts" . | quote }}
{{- end }}
{{- if include "bradley.tokenFile" . }}
BRADLEY_TOKEN_FILE: /etc/bradley/tokens/tokens.yaml
{{- end }}
{{- with include "bradley.oidcData" . | trim }}
{{ . }}
{{- end }}
{{- if .Values.tls.enabled }}
BRADLEY_TLS_CERT: /etc/bradley/tls/tls.crt
BRADLEY_TLS_KEY: /etc/bradley/tls/tls.key
{{- if .Values.tls.clientCa.existingSecret }}
BRADLEY_TLS_CLIENT_CA: /etc/bradley/client-ca/ca.crt
{{- end }}
{{- end }}
{{- with .Values.artifacts.url }}
BRADLEY_ARTIFACT_URL: {{ . | quote }}
{{- end }}
{{- range $name, $value := .Values.artifacts.env }}
{{ $name }}: {{ include "bradley.text" $value | quote }}
{{- end }}
{{- if .Values.huggingface.offline }}
HF_HUB_OFFLINE: "1"
{{- end }}
{{- range $name, $value := .Values.config }}
BRADLEY_{{ upper $name }}: {{ include "bradley.text" $value | quote }}
{{- end }}
{{- end -}}
