{{/* Name of the operator's objects. */}}
{{- define "elasticmoe.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- printf "%s-operator" .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s-operator" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* The groups' NetworkPolicies let in the pods of this name: it never changes. */}}
{{- define "elasticmoe.selector" -}}
app.kubernetes.io/name: elasticmoe-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "elasticmoe.labels" -}}
{{ include "elasticmoe.selector" . }}
app.kubernetes.io/component: operator
app.kubernetes.io/part-of: elasticmoe
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "elasticmoe.image" -}}
{{- with .Values.global.imageRegistry }}{{ trimSuffix "/" . }}/{{ end -}}
{{- .Values.image.repository -}}
{{- if .Values.image.digest }}@{{ .Values.image.digest }}
{{- else }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end -}}
{{- end -}}

{{- define "elasticmoe.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "elasticmoe.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | required "serviceAccount.create is false: give serviceAccount.name" -}}
{{- end -}}
{{- end -}}

{{/* Refuses a choice of namespaces that can't be meant. */}}
{{- define "elasticmoe.checkWatch" -}}
{{- if and .Values.watch.allNamespaces .Values.watch.namespaces -}}
{{- fail "watch.namespaces is set: set watch.allNamespaces to false too, or leave the list empty" -}}
{{- end -}}
{{- if not (or .Values.watch.allNamespaces .Values.watch.namespaces) -}}
{{- fail "watch.allNamespaces is false: name the namespaces to watch in watch.namespaces" -}}
{{- end -}}
{{- end -}}

{{/* What the operator may do with groups and their parts, in each namespace that it watches. */}}
{{- define "elasticmoe.rules" -}}
- apiGroups: [elasticmoe.io]
  resources: [elasticmoedeployments]
  verbs: [get, list, watch, patch]
- apiGroups: [elasticmoe.io]
  resources: [elasticmoedeployments/status]
  verbs: [get, patch]
# To own children that block their owner's deletion.
- apiGroups: [elasticmoe.io]
  resources: [elasticmoedeployments/finalizers]
  verbs: [update]
- apiGroups: [""]
  resources: [events]
  verbs: [create, patch]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, patch, delete]
- apiGroups: [apps]
  resources: [statefulsets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch]
# By name only: it never lists or watches Secrets.
- apiGroups: [""]
  resources: [configmaps, secrets, serviceaccounts, services]
  verbs: [get, create, patch]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, create, patch]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, create, patch]
{{- end -}}
