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

{{/* What selects the release's objects: it must never change, selectors are immutable. */}}
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

{{- define "bradley.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}{{ if .Values.gpu.enabled }}{{ .Values.gpu.imageTagSuffix }}{{ end }}
{{- end -}}
{{- end -}}

{{/* Not empty where the database and the artifacts are outside the pod, so that there may be several. */}}
{{- define "bradley.shared" -}}
{{- if or .Values.database.url .Values.database.existingSecret -}}true{{- end -}}
{{- end -}}

{{- define "bradley.autoscaled" -}}
{{- if or .Values.autoscaling.hpa.enabled .Values.autoscaling.keda.enabled -}}true{{- end -}}
{{- end -}}

{{/* Not empty where there may be more than one replica. */}}
{{- define "bradley.several" -}}
{{- if or (include "bradley.autoscaled" .) (gt (int .Values.replicaCount) 1) -}}true{{- end -}}
{{- end -}}

{{/* The variables that the chart puts in its own Secret. */}}
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

{{/* A setting's value as text. Numbers of a values file are floats, which would be written 4.194304e+06. */}}
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
  The limit of the host's memory, on CPU and on GPU pods: 0.9 · (limit − 1 GiB). One GiB is left to the process that decodes an uploaded Parquet file, a tenth
  to what an estimate does not see. It says nothing about a GPU's memory: the server asks each GPU at start, unless config.device_memory_limit is set.
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

{{/* What a model needs to be found: variables of the hub, for the server and for the pre-pull Job. */}}
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

{{- define "bradley.probe" -}}
httpGet:
  path: {{ .path }}
  port: http
{{- toYaml .timing | nindent 0 }}
{{- end -}}

{{/* What one call of the command line needs. */}}
{{- define "bradley.smallResources" -}}
requests:
  cpu: 10m
  memory: 32Mi
limits:
  memory: 256Mi
{{- end -}}

{{/* The environment that is no secret. The checksum on the pod is of this alone: a new chart version by itself starts no new pods. */}}
{{- define "bradley.configData" -}}
BRADLEY_MODELS: {{ join "," .Values.models | quote }}
BRADLEY_LISTEN: 0.0.0.0:50051
BRADLEY_HTTP_LISTEN: 0.0.0.0:9090
BRADLEY_DATA_DIR: /var/lib/bradley/data
{{- if .Values.gpu.enabled }}
BRADLEY_DEVICE: {{ .Values.gpu.device | quote }}
{{- end }}
{{- if not (hasKey .Values.config "memory_limit") }}
{{- with include "bradley.memoryLimit" . }}
BRADLEY_MEMORY_LIMIT: {{ . }}
{{- end }}
{{- end }}
{{- if .Values.auth.tokens }}
BRADLEY_AUTH: tokens
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
