{{/* The pod of the StatefulSet and the Deployment. */}}
{{- define "bradley.podTemplate" -}}
{{- $name := include "bradley.fullname" . -}}
{{- $shared := include "bradley.shared" . -}}
{{- $secret := include "bradley.secretData" . -}}
metadata:
  labels:
    {{- include "bradley.serverLabels" . | nindent 4 }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    # The server reads its settings only at start, so a change of these replaces the pods.
    checksum/config: {{ include "bradley.configData" . | sha256sum }}
    {{- if $secret }}
    checksum/secret: {{ $secret | sha256sum }}
    {{- end }}
    {{- if not .Values.metrics.monitor }}
    prometheus.io/scrape: "true"
    prometheus.io/port: "9464"
    prometheus.io/path: /metrics
    {{- end }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "bradley.serviceAccountName" . }}
  automountServiceAccountToken: false
  # Otherwise a Service named bradley would add BRADLEY_… variables to the environment.
  enableServiceLinks: false
  # Includes the sleep of preStop. After drain_timeout the server may need up to 34 seconds: 13 if
  # the database does not answer, 10 for the device, 5 for changes whose callers have left, 3 for
  # traces, and 1 each for open calls, the HTTP port and threads. 6 seconds are to spare.
  terminationGracePeriodSeconds: {{ add (default 30 .Values.config.drain_timeout | int) (int .Values.preStopSleepSeconds) 40 }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .Values.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with include "bradley.pullSecrets" . }}
  {{- . | nindent 2 }}
  {{- end }}
  securityContext:
    {{- toYaml .Values.podSecurityContext | nindent 4 }}
  {{- with .Values.initContainers }}
  initContainers:
    {{- tpl (toYaml .) $ | nindent 4 }}
  {{- end }}
  containers:
    - name: bradley
      image: {{ include "bradley.image" . | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: [serve]
      envFrom:
        - configMapRef:
            name: {{ $name }}
        {{- if $secret }}
        - secretRef:
            name: {{ $name }}
        {{- end }}
        {{- with .Values.artifacts.existingSecret }}
        - secretRef:
            name: {{ . }}
        {{- end }}
        {{- with .Values.extraEnvFrom }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      env:
        {{- include "bradley.hubEnv" . | nindent 8 }}
        {{- with .Values.database.existingSecret }}
        - name: BRADLEY_DATABASE_URL
          valueFrom:
            secretKeyRef:
              name: {{ . }}
              key: {{ $.Values.database.existingSecretKey }}
        {{- end }}
        {{- with .Values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - name: grpc
          containerPort: 50051
        - name: http
          containerPort: 9464
      startupProbe:
        {{- include "bradley.probe" (dict "path" "/livez" "timing" .Values.probes.startup) | nindent 8 }}
      livenessProbe:
        {{- include "bradley.probe" (dict "path" "/livez" "timing" .Values.probes.liveness) | nindent 8 }}
      readinessProbe:
        {{- include "bradley.probe" (dict "path" "/readyz" "timing" .Values.probes.readiness) | nindent 8 }}
      {{- if .Values.preStopSleepSeconds }}
      lifecycle:
        preStop:
          # The kubelet sleeps: the image has no shell.
          sleep:
            seconds: {{ .Values.preStopSleepSeconds }}
      {{- end }}
      {{- $resources := deepCopy .Values.resources }}
      {{- if .Values.gpu.enabled }}
      {{- $resources = mergeOverwrite $resources (dict "limits" (dict .Values.gpu.resource .Values.gpu.count)) }}
      {{- end }}
      {{- with $resources }}
      resources:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      securityContext:
        {{- toYaml .Values.securityContext | nindent 8 }}
      volumeMounts:
        - name: data
          mountPath: /var/lib/bradley
        {{- if .Values.modelCache.existingClaim }}
        - name: models
          mountPath: /var/lib/bradley/huggingface
          {{- with .Values.modelCache.subPath }}
          subPath: {{ . }}
          {{- end }}
        {{- end }}
        - name: tmp
          mountPath: /tmp
        {{- if .Values.tls.enabled }}
        # Whole folders, because files mounted by subPath do not follow changes of their Secret.
        - name: tls
          mountPath: /etc/bradley/tls
          readOnly: true
        {{- if include "bradley.caKey" . }}
        - name: server-ca
          mountPath: /etc/bradley/server-ca
          readOnly: true
        {{- end }}
        {{- if .Values.tls.clientCa.existingSecret }}
        - name: client-ca
          mountPath: /etc/bradley/client-ca
          readOnly: true
        {{- end }}
        {{- end }}
        {{- if include "bradley.tokenFile" . }}
        - name: tokens
          mountPath: /etc/bradley/tokens
          readOnly: true
        {{- end }}
        {{- if and .Values.auth.oidc.issuer .Values.auth.oidc.caSecret }}
        - name: oidc-ca
          mountPath: /etc/bradley/oidc-ca
          readOnly: true
        {{- end }}
        {{- with .Values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    {{- with .Values.extraContainers }}
    {{- tpl (toYaml .) $ | nindent 4 }}
    {{- end }}
  volumes:
    {{- if $shared }}
    - name: data
      emptyDir:
        sizeLimit: {{ .Values.cache.sizeLimit }}
    {{- else if not .Values.persistence.enabled }}
    - name: data
      emptyDir:
        sizeLimit: {{ .Values.persistence.size }}
    {{- else if .Values.persistence.existingClaim }}
    - name: data
      persistentVolumeClaim:
        claimName: {{ .Values.persistence.existingClaim }}
    {{- end }}
    {{- with .Values.modelCache.existingClaim }}
    - name: models
      persistentVolumeClaim:
        claimName: {{ . }}
    {{- end }}
    - name: tmp
      emptyDir: {}
    {{- if .Values.tls.enabled }}
    - name: tls
      secret:
        secretName: {{ include "bradley.tlsSecret" . }}
        # fsGroup gives the group read access.
        defaultMode: 0440
        items:
          - key: tls.crt
            path: tls.crt
          - key: tls.key
            path: tls.key
    {{- with include "bradley.caKey" . }}
    # For `bradley` commands in this pod. The server itself does not need it.
    - name: server-ca
      secret:
        secretName: {{ include "bradley.tlsSecret" $ }}
        defaultMode: 0440
        optional: true
        items:
          - key: {{ . }}
            path: ca.crt
    {{- end }}
    {{- with .Values.tls.clientCa.existingSecret }}
    - name: client-ca
      secret:
        secretName: {{ . }}
        defaultMode: 0440
        items:
          - key: {{ $.Values.tls.clientCa.key }}
            path: ca.crt
    {{- end }}
    {{- end }}
    {{- if include "bradley.tokenFile" . }}
    - name: tokens
      secret:
        secretName: {{ include "bradley.tokenSecret" . }}
        defaultMode: 0440
        items:
          - key: {{ empty .Values.auth.declared.existingSecret | ternary "tokens.yaml" .Values.auth.declared.existingSecretKey }}
            path: tokens.yaml
    {{- end }}
    {{- if .Values.auth.oidc.issuer }}
    {{- with .Values.auth.oidc.caSecret }}
    - name: oidc-ca
      secret:
        secretName: {{ . }}
        defaultMode: 0440
        items:
          - key: {{ $.Values.auth.oidc.caSecretKey }}
            path: ca.crt
    {{- end }}
    {{- end }}
    {{- with .Values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if .Values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml .Values.topologySpreadConstraints | nindent 4 }}
  {{- else if include "bradley.several" . }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "bradley.serverLabels" . | nindent 10 }}
      # Only pods of the same rollout count, so that old pods do not affect the spread.
      matchLabelKeys: [pod-template-hash]
  {{- end }}
{{- end -}}
